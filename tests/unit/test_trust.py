"""What a file names is data until the caller repeats it: no code runs, nothing is read or fetched, nothing is huge."""

from __future__ import annotations

import json
import shutil
import sys
import time
from contextlib import nullcontext, suppress
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forging import TINY, forge_config, forge_tensors, save_tiny

import vitquant
from vitquant.errors import CheckpointError, ModelError, VitquantError
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.graph.sites import Reader, Value
from vitquant.model.saved import digest, restore
from vitquant.model.stored_tensors import stored_quantizer
from vitquant.spec import QuantSpec, TwinUniform
from vitquant.zoo import ModelSource, architecture, preprocessing_of
from vitquant.zoo.budget import Budget, ForwardBudget
from vitquant.zoo.trust import as_repeated

VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "out"
    save_tiny(directory)
    return directory


@pytest.fixture
def saved(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "out"))


@pytest.fixture(scope="module")
def captured():
    model = architecture(ModelSource("timm:vit_tiny_patch16_224", TINY, "random"))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return CapturedModel(capture(model, images), (3, 32, 32))


@pytest.fixture
def trap(tmp_path):
    """A directory with a config whose code says that it ran."""
    folder = tmp_path / "trap"
    folder.mkdir()
    auto = {"AutoConfig": "conf.C", "AutoModelForImageClassification": "conf.M", "AutoImageProcessor": "conf.P"}
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "auto_map": auto, **VIT}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": auto}))
    marker = tmp_path / "ran"
    (folder / "conf.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    (folder / "weights.pth").write_bytes(b"")
    return folder


def named(saved: Path, name: str, arguments: dict | None = None, weights: str = "random") -> Path:
    source = {"name": name, "arguments": arguments or {}, "weights": weights, "seed": 0, "weights_sha256": None}
    forge_config(saved, lambda config: config.update(source=source))
    return saved


def refused(saved: Path, said: str) -> None:
    started = time.monotonic()
    for use in (vitquant.load, vitquant.float_model):
        with pytest.raises(VitquantError, match=said) as error:
            use(saved)
        assert len(str(error.value).splitlines()) == 1
    assert time.monotonic() - started < 20


def test_remote_code_of_a_directory_does_not_run(saved, trap):
    for arguments in ({"trust_remote_code": True}, {"trust_remote_code": True, "code_revision": "main"}, {}):
        refused(named(saved, f"transformers:{trap}", arguments), "repeat it")
        assert not (trap.parent / "ran").exists()


def test_a_directory_that_the_caller_names_still_runs_no_code(saved, trap):
    named(saved, f"transformers:{trap}", {"trust_remote_code": True})
    with pytest.raises(VitquantError, match="trust_remote_code"):
        vitquant.load(saved, source=f"transformers:{trap}")
    named(saved, f"transformers:{trap}")
    with pytest.raises(VitquantError):
        vitquant.load(saved, source=f"transformers:{trap}")
    with suppress(VitquantError):
        preprocessing_of(SimpleNamespace(config=None), ModelSource(f"transformers:{trap}", {}, "random"))
    assert not (trap.parent / "ran").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"checkpoint_path": "{trap}/weights.pth"},
        {"pretrained_cfg_overlay": {"file": "{trap}/weights.pth"}},
        {"pretrained_cfg": {"url": "http://example.org"}},
        {"pretrained_cfg": "in1k"},
        {"cache_dir": "{trap}"},
        {"scriptable": True},
        {"exportable": True},
        {"features_only": True},
        {"pretrained_strict": False},
        {"act_layer": "os.system"},
        {"act_layer": "../gelu"},
        {"norm_layer": {"a": 1}},
        {"attn_implementation": "org/kernel"},
        {"backbone": "resnet50"},
        {"use_timm_backbone": True},
        {"_name_or_path": "org/model"},
        {"token": "x"},
        {"proxies": {"https": "http://example.org"}},
        {"weights": "DEFAULT"},
        {"weights_backbone": "DEFAULT"},
        {"depth": 10**6},
        {"embed_dim": 10**9},
        {"img_size": 20_000},
        {"img_size": [1024, 100_000]},
        {"depth": 2.0**40},
        {"mlp_ratio": 1e9},
    ],
)
def test_an_argument_that_loads_or_is_huge_is_repeated_or_refused(saved, trap, arguments):
    arguments = json.loads(json.dumps(arguments).replace("{trap}", str(trap)))
    refused(named(saved, "timm:vit_tiny_patch16_224", {**TINY, **arguments}), f"{next(iter(arguments))}.*repeat it")
    source = ModelSource("timm:vit_tiny_patch16_224", {**TINY, **arguments})
    assert as_repeated(source, None, arguments) == source


@pytest.mark.parametrize(
    "name",
    [
        "timm:hf-hub:org/model", "timm:local-dir:{trap}", "timm:hf_hub:org/model", "timm:../vit", "timm:vit_tiny.a/b",
        "transformers:org/model", "transformers:{trap}", "transformers:{trap}/config.json", "python:os:system",
        "torchvision:../vit", "torchvision:fcn_resnet50", "torchvision:fasterrcnn_resnet50_fpn",
        "transformers:timm_wrapper",
        "transformers:/dev/zero", "transformers:timm/vit_tiny_patch16_224",
    ],
)  # fmt: skip
def test_a_name_that_no_library_lists_is_repeated_or_refused(saved, trap, name):
    name = name.replace("{trap}", str(trap))
    refused(named(saved, name, TINY), "repeat it")
    assert as_repeated(ModelSource(name), name, {}).name == name
    assert not (trap.parent / "ran").exists()


def test_a_directory_is_not_taken_for_a_model_type_of_its_name(saved, trap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trap.rename(tmp_path / "vit")
    refused(named(saved, "transformers:vit", TINY), "repeat it")


@pytest.mark.parametrize(("weights", "said"), [("pretrained", "--weights pretrained"), ("/etc/passwd", "repeat it")])
def test_float_weights_that_a_file_names_are_not_fetched_and_not_read(saved, monkeypatch, weights, said):
    monkeypatch.setattr("vitquant.loading.create", lambda *_: pytest.fail("it was made"))
    named(saved, "timm:vit_tiny_patch16_224", TINY, weights)
    with pytest.raises(CheckpointError, match=said):
        vitquant.float_model(saved)


@pytest.mark.parametrize(("size", "outcome"), [(32, "runs"), (256, "refused")])
def test_a_small_model_cannot_ask_for_attention_among_thousands_of_tokens(size, outcome):
    sizes = {**TINY, "img_size": size, "patch_size": 2, "embed_dim": 8}
    model = architecture(ModelSource("timm:vit_tiny_patch16_224", sizes, "random"))
    budget = ForwardBudget({key: tensor.shape for key, tensor in model.state_dict().items()})
    expected = nullcontext() if outcome == "runs" else pytest.raises(ModelError, match="far too many")
    with torch.no_grad(), expected, budget:
        model(torch.zeros(2, 3, size, size))


def test_a_saved_model_of_far_too_large_images_is_refused_until_its_source_is_repeated(saved, monkeypatch):
    monkeypatch.setattr("vitquant.zoo.budget._SPARE_ELEMENTS", 0)
    monkeypatch.setattr("vitquant.zoo.budget._LARGEST", 0.01)
    with pytest.raises(CheckpointError, match=r"far too .*--model NAME"):
        vitquant.load(saved)
    vitquant.load(saved, source="timm:vit_tiny_patch16_224")


def test_a_factory_gets_from_a_file_numbers_only(saved):
    source = ModelSource("python:json:loads", {"s": "[]"})
    with pytest.raises(ModelError, match="repeat it: --model-arg"):
        as_repeated(source, source.name, {})
    assert as_repeated(source, source.name, {"s": "[]"}) == source
    numbers = ModelSource("python:json:loads", {"width": 8, "deep": [1, None, True]})
    assert as_repeated(numbers, numbers.name, {}) == numbers


def test_what_is_repeated_has_to_be_what_was_saved():
    source = ModelSource("timm:vit_tiny_patch16_224", {"depth": 10**6, "img_size": [32, 32]})
    assert as_repeated(source, None, {"depth": 10**6, "img_size": (32, 32)}) == source
    with pytest.raises(ModelError, match="not from timm:other"):
        as_repeated(source, "timm:other", {})
    for arguments in ({"depth": 2}, {"dpth": 10**6}):
        with pytest.raises(ModelError, match="was made without"):
            as_repeated(source, None, arguments)


@pytest.mark.parametrize(
    "values",
    [
        {}, {"auto_map": {"AutoConfig": "conf.C"}}, {"backbone": "org/model"}, {"use_timm_backbone": True},
        {"_name_or_path": "org/model"}, {"attn_implementation": "org/kernel"}, {"hidden_size": 10**9},
        {"quantization_config": {"quant_method": "x"}}, {"model_type": "timm_wrapper", "architecture": "hf-hub:a/b"},
        {"model_type": "nothing"},
    ],
)  # fmt: skip
def test_a_config_of_plain_numbers_is_read_and_no_other(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "id2label": {"0": "x"}, **VIT, **values}))
    for path in (tmp_path, tmp_path / "config.json"):
        source = ModelSource(f"transformers:{path}", {}, "random")
        if not values:
            assert as_repeated(source, None, {}) == source
            continue
        with pytest.raises(ModelError, match="repeat it"):
            as_repeated(source, None, {})


def test_an_untouched_model_needs_no_repetition(saved):
    assert digest(vitquant.load(saved)) == digest(vitquant.load(saved, arguments={"depth": 1}))
    assert isinstance(vitquant.float_model(saved), torch.nn.Module)


@pytest.mark.parametrize(
    "arguments",
    [{"depth": 60_000}, {"embed_dim": 60_000}, {"num_classes": 65_536, "embed_dim": 4096}],
)
def test_a_source_that_builds_more_than_was_saved_is_refused_before_memory_goes(saved, arguments):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(
        named(saved, "timm:vit_tiny_patch16_224", {**TINY, **arguments}), "larger model than the one that was saved"
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes


def test_a_source_that_builds_another_model_is_refused_before_it_runs(saved, monkeypatch):
    monkeypatch.setattr("vitquant.loading.capture", lambda *_: pytest.fail("it ran"))
    named(saved, "timm:vit_tiny_patch16_224", {**TINY, "num_classes": 8})
    with pytest.raises(CheckpointError, match=r"head\.weight is not the one that was saved"):
        vitquant.load(saved)


def test_a_truncated_file_is_told_from_a_wrong_one_before_a_model_is_made(saved):
    tensors = saved / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    refused(saved, r"holds 1000 bytes of \d+: it was truncated; copy it again")


def test_a_budget_does_not_change_what_is_built():
    def draw() -> torch.Tensor:
        torch.manual_seed(3)
        return torch.nn.Linear(5, 7).weight

    expected = draw()
    with Budget({"a": [7, 5]}):
        assert torch.equal(draw(), expected)
        with pytest.raises(ModelError, match="larger model"):
            torch.zeros(2**20)[:, None] + torch.zeros(2**20)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({"head.bias": t["head.bias"].to(torch.int32)}), r"head\.bias is torch\.int32"),
        (lambda t: t.update({"head.bias": t["head.bias"] > 0}), r"head\.bias is torch\.bool"),
        (lambda t: t["head.bias"].fill_(float("nan")), r"head\.bias holds NaN"),
        (lambda t: t["head.bias"].fill_(float("inf")), r"head\.bias holds NaN or infinity"),
        (lambda t: t.update({"head.bias": t["head.bias"].half()}), r"head\.bias is torch\.float16"),
        (lambda t: t["quantizers.head:input.scale"].fill_(float("nan")), "head:input has a scale that is not positive"),
        (lambda t: t["quantizers.head:input.scale"].fill_(1e-44), "head:input has a scale"),
        (lambda t: t["quantizers.head:input.zero_point"].fill_(2**30), "head:input has zero points"),
        (lambda t: t.pop("quantizers.head:input.zero_point"), "head:input has no zero point"),
        (lambda t: t["quantizers.head:weight.zero_point"].fill_(1), "head:weight has zero points"),
        (lambda t: t.update({"quantizers.head:input.scale": torch.ones(3)}), "head:input has a scale of"),
        (lambda t: t.update({"head.weight": t["head.weight"].float()}), "head.weight' is torch.float32"),
        (lambda t: t["quantizers.blocks.0.norm1:input.factor"].fill_(9), "norm1:input has factors"),
    ],
)
def test_tensors_that_no_model_has_are_refused(saved, captured, change, said):
    forge_tensors(saved, change)
    with pytest.raises(CheckpointError, match=said):
        restore(saved, deepcopy(captured))


@pytest.mark.parametrize("zero", [-1, 64])
def test_the_zero_of_twin_steps_is_one_of_its_codes(zero):
    value = Value("node", (Reader("head", "head", "linear", "input"),), (-1, 4), -1)
    spec = QuantSpec(6, scheme=TwinUniform())
    tensors = {"q.scale": torch.tensor(0.1), "q.zero_point": torch.tensor(zero, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match=r"head:input has zero points that are not int32 .* from 0 to 63"):
        stored_quantizer(tensors, "q", value, spec, "OUT")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(format=-1), "format -1, older than"),
        (lambda c: c["quantization_config"].update(operands={}), "operands = a table should be a table of 1 or more"),
        (lambda c: c.update(extra=1), "unknown key 'extra'"),
        (lambda c: c.pop("records"), "'records' is missing"),
        (lambda c: c.update(input_shape=[3, 60_000, 60_000]), "no image has more than"),
        (lambda c: c.update(input_shape=[3, 32, True]), r"input_shape\[2\] = True"),
        (
            lambda c: c["quantization_config"]["operands"]["head:input"]["spec"].update(bits=300),
            r"head:input.*bits = 300",
        ),
        (
            lambda c: c["quantization_config"]["operands"]["head:input"]["spec"].update(bits=7),
            "not what its recipe says",
        ),
        (lambda c: c["quantization_config"]["recipe"].update(relative_cost=0), "relative_cost"),
        (lambda c: c["preprocessing"].update(std=[1e-320] * 3), "std"),
        (lambda c: c["source"].update(seed=1.5), "seed = 1.5 should be an integer"),
        (lambda c: c["files"].pop("model.safetensors"), "'model.safetensors' is missing"),
    ],
)
def test_a_config_that_no_model_has_is_refused_with_its_key(saved, change, said):
    forge_config(saved, change)
    with pytest.raises(VitquantError, match=said) as error:
        vitquant.load(saved)
    assert str(saved) in str(error.value)


def test_the_command_line_repeats_an_argument(saved, capsys):
    from vitquant.cli.main import main

    named(saved, "timm:vit_tiny_patch16_224", {**TINY, "scriptable": False})
    for words, code in (([], 2), (["--model-arg", "scriptable=False"], 0)):
        with pytest.raises(SystemExit) as ended:
            main(["inspect", str(saved), "--quiet", *words])
        assert ended.value.code == code
    assert "repeat it: --model-arg" in capsys.readouterr().err
    assert "conf" not in sys.modules

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from vitquant.errors import ModelError
from vitquant.zoo import ModelSource, architecture, create, parse_model_arguments, pinned
from vitquant.zoo.failures import import_library

TIMM = "timm:vit_tiny_patch16_224"
ONE_BLOCK = {"depth": 1, "num_classes": 4, "img_size": 32}
TINY_VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "num_labels": 4}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def make_net(width=3, fail=False):
    """A user's factory."""
    if fail:
        raise RuntimeError("two\nlines")
    return nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5))


NET = f"python:{__name__}:make_net"


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- sources and arguments --------------------------------------------------------------------------


@given(st.dictionaries(st.text(), JSON, max_size=3), st.integers(0, 2**31), st.text())
def test_a_source_survives_json(arguments, seed, weights):
    source = ModelSource("timm:x", arguments, weights, seed, "ab" * 32)
    assert ModelSource.from_dict(json.loads(json.dumps(source.to_dict()))) == source


def test_tuples_become_lists_before_json_makes_them_so():
    assert ModelSource("timm:x", {"img_size": (32, 48)}).arguments == {"img_size": [32, 48]}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"weights": "random"}, "no key 'name'"),
        ({"name": "timm:x", "wieghts": "random"}, "unknown key 'wieghts'"),
        ({"name": "timm:x", "seed": "0"}, "seed cannot be '0'"),
        ({"name": "timm:x", "seed": True}, "seed cannot be True"),
        ({"name": 3}, "name cannot be 3"),
        ({"name": "timm:x", "arguments": []}, "arguments cannot be"),
    ],
)
def test_a_bad_source_is_refused_by_key(values, said):
    with pytest.raises(ModelError, match=said):
        ModelSource.from_dict(values)


@pytest.mark.parametrize(
    ("name", "said"), [("tim:deit", "did you mean timm:"), ("timm", "LIBRARY:NAME"), ("timm:", "LIBRARY:NAME")]
)
def test_a_name_without_a_known_library_is_refused(name, said):
    with pytest.raises(ModelError, match=said):
        ModelSource(name)


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), torch.float16])
def test_arguments_that_json_cannot_hold_are_refused(value):
    with pytest.raises(ModelError, match="timm:x: model arguments"):
        ModelSource("timm:x", {"key": value})


def test_arguments_are_literals_or_else_strings():
    texts = ["num_classes=10", "img_size=(32, 48)", "act=gelu", "drop=1e-2", "bias=True", "norm=None", "a=b=c", "e="]
    assert parse_model_arguments(texts) == {
        "num_classes": 10, "img_size": (32, 48), "act": "gelu", "drop": 0.01,
        "bias": True, "norm": None, "a": "b=c", "e": "",
    }  # fmt: skip


@pytest.mark.parametrize("texts", [["depth"], ["=3"], ["a b=3"], ["depth=1", "depth=2"], ["bias=false"], ["norm=null"]])
def test_bad_arguments_are_refused(texts):
    with pytest.raises(ModelError, match="model argument"):
        parse_model_arguments(texts)


# --- architectures and random weights ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (TIMM, ONE_BLOCK),
        ("transformers:vit", TINY_VIT),
        ("transformers:deit", TINY_VIT),  # a type with two classification classes
        ("torchvision:swin_t", {"num_classes": 4}),
        (NET, {"width": 5}),
    ],
)
def test_random_weights_follow_the_seed_and_nothing_else(name, arguments):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = create(ModelSource(name, arguments, "random", seed=3))
    assert torch.rand(1) == expected  # the global generator was not used
    assert equal(first, create(ModelSource(name, arguments, "random", seed=3)))
    assert equal(first, architecture(ModelSource(name, arguments, "pretrained" if name == TIMM else "random", seed=3)))
    assert not equal(first, create(ModelSource(name, arguments, "random", seed=4)))
    assert not any(module.training for module in first.modules())
    assert {p.dtype for p in first.parameters()} == {torch.float32}


def test_the_arguments_reach_the_libraries():
    assert len(create(ModelSource(TIMM, ONE_BLOCK, "random")).blocks) == 1
    assert create(ModelSource("transformers:vit", TINY_VIT, "random")).config.num_labels == 4
    assert create(ModelSource("torchvision:swin_t", {"num_classes": 4}, "random")).head.out_features == 4
    assert create(ModelSource(NET, {"width": 5}))[0].in_features == 5


def test_a_transformers_config_is_read_from_a_file_or_a_directory(tmp_path):
    from transformers import ViTConfig

    ViTConfig(**TINY_VIT).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        model = create(ModelSource(f"transformers:{path}", {"hidden_size": 16}, "random"))
        assert (model.config.hidden_size, model.config.num_labels) == (16, 4)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("timm:deit_tiny_patch16", {}, "no model 'deit_tiny_patch16'; did you mean deit_tiny_patch16_224"),
        ("torchvision:swin_tt", {}, "no model 'swin_tt'; did you mean swin_t"),
        ("transformers:vitt", {}, "no model 'vitt'; did you mean vit"),
        ("transformers:vit", {"hidden_sze": 8}, "no argument 'hidden_sze'; did you mean hidden_size"),
        ("transformers:bert", {}, "cannot be built.*AutoModelForImageClassification"),
        (TIMM, {"dpth": 1}, "cannot be built with dpth=1.*unexpected keyword argument"),
        ("torchvision:swin_t", {"depht": 1}, "cannot be built with depht=1"),
        (NET, {"fail": True}, "cannot be built with fail=True: RuntimeError: two lines"),
        ("python:no_such_module:make", {}, "cannot be imported.*no_such_module.*PYTHONPATH"),
        (f"python:{__name__}:no_such_factory", {}, "cannot be imported.*no_such_factory"),
        (f"python:{__name__}", {}, "package.module:factory"),
        ("python:builtins:dict", {}, "gives dict, not a torch.nn.Module"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(name, arguments, said):
    with pytest.raises(ModelError, match=said) as error:
        create(ModelSource(name, arguments, "random"))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_an_absent_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"timm is not installed: pip install vitquant\[timm\]"):
        create(ModelSource(TIMM, weights="random"))


def test_what_a_library_lacks_is_named_and_not_the_library(tmp_path, monkeypatch):
    for name, code in {"needy": "import absent_package.part", "broken": "import json\njson.no_such_name"}.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"^needy needs absent_package, which is not installed: pip install absent_p"):
        import_library("needy")
    with pytest.raises(ModelError, match=r"^broken is installed but cannot be imported: AttributeError"):
        import_library("broken")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModelError, match=r"^torchvision is not installed: pip install vitquant\[timm\]"):
        import_library("torchvision")


def test_importing_the_zoo_costs_torch_only():
    code = "import sys, vitquant.zoo, vitquant.tasks.classification\n"
    code += "print({'timm', 'torchvision', 'PIL', 'transformers', 'safetensors'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# --- weights ----------------------------------------------------------------------------------------


@pytest.fixture
def trained():
    return create(ModelSource(TIMM, ONE_BLOCK, "random", seed=9))


@pytest.mark.parametrize("kind", ["safetensors", "pth", "pt"])
def test_weights_are_read_from_a_file(tmp_path, trained, kind):
    path = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file(trained.state_dict(), path)
    else:  # bare, or as training scripts save it
        torch.save(trained.state_dict() if kind == "pt" else {"model": trained.state_dict(), "epoch": 3}, path)
    assert equal(create(ModelSource(TIMM, ONE_BLOCK, str(path))), trained)


def test_half_precision_weights_become_float32(tmp_path, trained):
    save_file({key: value.half() for key, value in trained.state_dict().items()}, tmp_path / "half.safetensors")
    model = create(ModelSource(TIMM, ONE_BLOCK, str(tmp_path / "half.safetensors")))
    assert equal(model, trained.half().float())


def test_weights_that_do_not_fit_are_listed_up_to_five_of_a_kind(tmp_path, trained):
    state = trained.state_dict()
    state["head.weight"] = torch.zeros(7, 192)
    state = {("module." if key.startswith("blocks") else "") + key: value for key, value in state.items()}
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ModelError) as error:
        create(ModelSource(TIMM, ONE_BLOCK, str(tmp_path / "other.safetensors")))
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'other.safetensors'} does not fit {TIMM}: 12 missing: blocks.0.")
    assert "12 unexpected: module.blocks.0." in said
    assert "1 of another shape: head.weight [7, 192] for [4, 192]" in said
    assert said.count("module.blocks") == 5
    assert "\n" not in said


class RunsWhenUnpickled:
    """What a weights file from a stranger may hold."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def test_damaged_or_foreign_files_are_refused_by_name(tmp_path, trained):
    whole = tmp_path / "whole.safetensors"
    save_file(trained.state_dict(), whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "text.safetensors").write_text("not weights")
    torch.save(trained.state_dict(), tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:-1000])
    torch.save({"w": RunsWhenUnpickled(tmp_path / "made")}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "weights.npz").write_text("")
    for name in ("cut.safetensors", "text.safetensors", "cut.pth", "code.pth", "list.pt", "weights.npz", "no.pth"):
        with pytest.raises(ModelError, match=name) as error:
            create(ModelSource(TIMM, ONE_BLOCK, str(tmp_path / name)))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()


def test_a_pinned_weights_file_must_stay_the_same(tmp_path, trained):
    path = tmp_path / "weights.safetensors"
    save_file(trained.state_dict(), path)
    source = pinned(ModelSource(TIMM, ONE_BLOCK, str(path)))
    assert equal(create(source), trained)
    save_file({key: value + 1 for key, value in trained.state_dict().items()}, path)
    with pytest.raises(ModelError, match="SHA-256"):
        create(source)
    architecture(source)  # needs no weights
    assert pinned(ModelSource(TIMM, weights="random")).weights_sha256 is None


def test_pretrained_weights_are_the_librarys(tmp_path, trained):
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.safetensors"), "num_classes": 4}}
    assert equal(create(ModelSource(TIMM, {**ONE_BLOCK, **overlay})), trained)


def test_a_pretrained_transformers_directory_is_loaded_whole_or_refused(tmp_path):
    model = create(ModelSource("transformers:vit", TINY_VIT, "random", seed=5))
    model.save_pretrained(tmp_path / "whole")
    for path in (tmp_path / "whole", tmp_path / "whole" / "config.json"):
        assert equal(create(ModelSource(f"transformers:{path}")), model)
    model.vit.save_pretrained(tmp_path / "headless")
    with pytest.raises(ModelError, match=r"no fitting classifier.bias, classifier.weight; give --weights FILE"):
        create(ModelSource(f"transformers:{tmp_path / 'headless'}", {"num_labels": 4}))


def test_a_pretrained_model_with_other_classes_would_have_a_random_head_and_is_refused(tmp_path):
    save_file(create(ModelSource(TIMM, {"depth": 1}, "random")).state_dict(), tmp_path / "weights.safetensors")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.safetensors")}}
    with pytest.raises(ModelError, match="pretrained for 1000 classes"):
        create(ModelSource(TIMM, {"depth": 1, "num_classes": 4, **overlay}))


def test_a_model_type_has_no_pretrained_weights():
    with pytest.raises(ModelError, match="model type without weights; give --weights"):
        create(ModelSource("transformers:vit", TINY_VIT))


def test_a_failed_download_tells_what_to_do(monkeypatch):
    import timm

    make = timm.create_model

    def offline(name, pretrained=False, **arguments):
        if pretrained:
            raise OSError("We couldn't connect\nto the hub")
        return make(name, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ModelError, match=r"couldn't connect to the hub\); give --weights FILE or --weights random"):
        create(ModelSource(TIMM))
    with pytest.raises(ModelError, match="cannot be built with dpth=1"):  # the arguments are at fault, not the network
        create(ModelSource(TIMM, {"dpth": 1}))
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: offline("", True))
    with pytest.raises(ModelError, match=r"give the path of its config.json, and --weights FILE or --weights random"):
        create(ModelSource("transformers:google/vit-base-patch16-224"))


def test_the_real_weights_fit(shared):
    path = shared / "weights" / "deit_tiny_patch16_224.safetensors"
    model = create(ModelSource("timm:deit_tiny_patch16_224", weights=str(path)))
    assert sum(p.numel() for p in model.parameters()) == 5_717_416

"""Weights as people have them: containers, prefixes, endings, and files that are something else."""

import argparse
import datetime
import json
import pathlib
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from vitquant.errors import ModelError
from vitquant.zoo import ModelSource, create, pinned
from vitquant.zoo.state_dicts import choose

TIMM = "timm:vit_tiny_patch16_224"
ONE_BLOCK = {"depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 4, "img_size": 32}
TINY_VIT = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "num_labels": 4,
    "image_size": 32, "patch_size": 16,
}  # fmt: skip
TV = "torchvision:vit_b_16"
PREFIXES = ("", "module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.", "net.vit.")


def make_norm():
    """A user's factory, with running statistics."""
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def make_masked():
    """A user's factory, with a causal mask among what it saves."""
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), -float("inf")).triu(1))
    return model


@pytest.fixture(scope="module")
def trained():
    return create(ModelSource(TIMM, ONE_BLOCK, "random", seed=9)).state_dict()


@pytest.fixture
def loads(tmp_path):
    """What becomes of an object that was saved: the model's state dict and the notes."""

    def load(saved, name=TIMM, arguments=ONE_BLOCK, key=None, file="weights.pth"):
        path = tmp_path / file
        if saved is not None:
            torch.save(saved, path)
        notes = []
        return create(ModelSource(name, arguments, str(path), weights_key=key), notes.append).state_dict(), notes

    return load


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in right)


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def refused(load, *args, said, **kwargs):
    with pytest.raises(ModelError, match=said) as error:
        load(*args, **kwargs)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


# --- containers and prefixes ------------------------------------------------------------------------

NAMES = st.lists(st.sampled_from(["model", "module", "a", "backbone", "_orig_mod", "net"]), max_size=3)


@settings(deadline=None)
@given(NAMES, NAMES, st.booleans())
def test_a_state_dict_is_found_under_any_container_and_prefix(containers, prefix, counted):
    wanted = {"blocks.0.weight": torch.rand(2), "norm.weight": torch.rand(2), "head.bias": torch.rand(1)}
    held = under("".join(f"{part}." for part in prefix), wanted)
    if counted:
        held = {**held, "n_averaged": torch.tensor(3)} if prefix else held
    for container in containers:
        held = {container: held, "epoch": 3, "optimizer": {"state": {0: {"step": torch.rand(9)}}, "param_groups": []}}
    chosen = choose(held, wanted, None)
    assert equal(chosen.tensors, wanted)
    assert not chosen.notes


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_all_keys_share_is_taken_off(loads, trained, prefix):
    found, notes = loads(under(prefix, trained))
    assert equal(found, trained)
    assert notes == []


@pytest.mark.parametrize(
    "key", ["model", "state_dict", "model_state_dict", "net", "weights", "params", "ema", "teacher", "anything"]
)
def test_a_container_is_looked_into(loads, trained, key):
    assert equal(loads({key: under("module.", trained), "epoch": 3, "best": 81.2, "note": None})[0], trained)


@pytest.mark.parametrize("averaged", ["model_ema", "state_dict_ema", "ema", "teacher", "ema_state_dict", "swa"])
@pytest.mark.parametrize("plain", ["model", "state_dict", "student"])
def test_averaged_weights_are_taken_with_a_note_and_the_others_by_key(loads, trained, averaged, plain):
    other = {key: value + 1 for key, value in trained.items()}
    inner = "" if averaged == "ema" else "module."
    saved = {plain: other, averaged: {**under(inner, trained), "n_averaged": torch.tensor(5)}}
    found, notes = loads(saved)
    assert equal(found, trained)
    assert len(notes) == 1
    assert repr(f"{averaged}.{inner}".rstrip(".")) in notes[0]
    assert f"'{plain}'" in notes[0]
    assert "--weights-key" in notes[0]
    assert equal(loads(saved, key=plain)[0], other)
    assert equal(loads(saved, key=averaged)[0], trained)


def test_averaged_weights_without_names_are_left_out_with_a_note(loads, trained):
    averages = {"decay": 0.99, "num_updates": 3, "shadow_params": list(trained.values()), "collected_params": None}
    found, notes = loads({"model": trained, "ema": averages})  # torch_ema's state
    assert equal(found, trained)
    assert len(notes) == 1
    assert "ema.shadow_params holds averaged weights without names, which are left out" in notes[0]
    assert loads({"model": trained, "ema": {**averages, "shadow_params": []}})[1] == []


def test_a_key_is_looked_for_from_the_front_before_it_is_a_part(loads, trained):
    other = {key: value + 1 for key, value in trained.items()}
    saved = {"ema": {"model": other}, "model": trained}
    assert equal(loads(saved, key="model")[0], trained)
    assert equal(loads(saved, key="ema")[0], other)
    assert equal(loads({"run": {"model": trained, "ema": other}}, key="model")[0], trained)


def test_dictionaries_that_hold_each_other_are_looked_into_once(loads, trained):
    around: dict[str, object] = {"weights": trained}
    around |= {f"{number}": around for number in range(300)}
    assert equal(loads(around)[0], trained)


def test_the_key_is_saved_with_the_source(tmp_path, trained):
    other = {key: value + 1 for key, value in trained.items()}
    torch.save({"model": other, "model_ema": trained}, tmp_path / "w.pth")
    source = pinned(ModelSource(TIMM, ONE_BLOCK, str(tmp_path / "w.pth"), weights_key="model"))
    again = ModelSource.from_dict(json.loads(json.dumps(source.to_dict())))
    assert equal(create(again, print).state_dict(), other)


def test_a_key_without_a_file_is_refused():
    for weights in ("random", "pretrained"):
        with pytest.raises(ModelError, match="weights_key 'model' chooses within a file"):
            create(ModelSource(TIMM, ONE_BLOCK, weights, weights_key="model"))


def test_a_note_is_a_warning_where_nobody_listens(tmp_path, trained):
    torch.save({"model": trained, "model_ema": {key: value + 1 for key, value in trained.items()}}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="model_ema"):
        create(ModelSource(TIMM, ONE_BLOCK, str(tmp_path / "w.pth")))


def test_a_whole_model_beside_other_tensors_is_taken_and_they_are_named(loads, trained):
    found, notes = loads({"state_dict": {**under("model.", trained), "criterion.weight": torch.rand(4)}})
    assert equal(found, trained)
    assert "criterion.weight" in notes[0]


def test_students_and_teachers_in_one_state_dict(loads, trained):
    other = {key: value + 1 for key, value in trained.items()}
    saved = {**under("student.backbone.", other), **under("teacher.backbone.", trained)}
    assert equal(loads(saved)[0], trained)
    assert equal(loads(saved, key="student")[0], other)


def test_several_that_fit_alike_are_asked_about(loads, trained):
    saved = {"last": trained, "best": {key: value + 1 for key, value in trained.items()}}
    refused(loads, saved, said="'last', 'best'.*--weights-key")
    assert equal(loads(saved, key="best")[0], saved["best"])
    assert equal(loads({"last": trained, "best": dict(trained)})[0], trained)  # the same tensors twice
    refused(loads, saved, key="ema", said="no weights under 'ema', but 'last', 'best'")


def test_a_prefix_of_some_keys_is_no_prefix(loads, trained):
    mixed = {("module." if key.startswith("blocks") else "") + key: value for key, value in trained.items()}
    refused(loads, mixed, said="missing: blocks.0.*unexpected: module.blocks.0")


def test_plain_values_beside_tensors_and_absent_counters_do_not_matter(loads, tmp_path):
    name = f"python:{__name__}:make_norm"
    state = create(ModelSource(name, {}, "random", seed=3)).state_dict()
    saved = OrderedDict((key, value) for key, value in state.items() if not key.endswith("tracked"))
    saved |= {"epoch": 3, "lr": 0.1, "note": "x"}
    assert equal(loads(saved, name, {})[0], state)


def test_arrays_are_weights_too(loads, trained):
    assert equal(loads({key: value.numpy() for key, value in trained.items()})[0], trained)


# --- endings, shards, directories -------------------------------------------------------------------


@pytest.mark.parametrize("file", ["w.bin", "w.ckpt", "w.pth.tar", "w.pt.tar", "w", "w.safetensors", "w.model"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_file_is_known_by_what_it_holds(loads, trained, tmp_path, file, kind):
    if kind == "safetensors":
        save_file(trained, tmp_path / file)
    else:
        torch.save(trained, tmp_path / file, _use_new_zipfile_serialization=kind == "zip")
    assert equal(loads(None, file=file)[0], trained)


def test_a_length_that_reads_as_a_brace_is_a_length(loads, trained, tmp_path):
    for size in (ord("{"), 0x7B20, 0x7B0A):  # "{", " {", and a line before it
        header = dict(sorted(header_of(trained).items()))
        text = json.dumps(header)
        text += " " * ((size - len(text)) % 2**8 if size < 2**8 else size - len(text))
        content = b"".join(trained[key].contiguous().numpy().tobytes() for key in header)
        (tmp_path / "w").write_bytes(len(text).to_bytes(8, "little") + text.encode() + content)
        assert equal(loads(None, file="w")[0], trained)


def header_of(state):
    """What safetensors writes before the tensors."""
    found, end = {}, 0
    for key, tensor in sorted(state.items()):
        begin, end = end, end + tensor.nbytes
        found[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    return found


@pytest.mark.parametrize("given_as", ["index", "directory"])
def test_shards_are_read_by_their_index_and_pinned(loads, trained, tmp_path, given_as):
    shards = {"model-1.safetensors": list(trained)[:5], "model-2.safetensors": list(trained)[5:]}
    for name, keys in shards.items():
        save_file({key: trained[key] for key in keys}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, keys in shards.items() for key in keys}}))
    file = index.name if given_as == "index" else "."
    assert equal(loads(None, file=file)[0], trained)
    source = pinned(ModelSource(TIMM, ONE_BLOCK, str(tmp_path / file)))
    save_file({key: trained[key] + 1 for key in shards["model-2.safetensors"]}, tmp_path / "model-2.safetensors")
    with pytest.raises(ModelError, match="SHA-256"):
        create(source)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "absent", 3, ["x"]])
def test_an_index_names_files_beside_it_only(loads, tmp_path, trained, shard):
    (tmp_path / "in").mkdir()
    save_file(trained, tmp_path / "outside.safetensors")
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    refused(loads, None, file="in/model.safetensors.index.json", said="not beside it|no index")


# --- what is something else -------------------------------------------------------------------------


def test_plain_values_of_training_scripts_are_read(loads, trained):
    saved = {
        "model": trained,
        "args": argparse.Namespace(lr=0.1, output=pathlib.Path("/tmp/x"), when=datetime.datetime(2024, 1, 1)),
        "best": np.float64(81.2), "epoch": np.int64(3), "history": np.arange(3.0), "seen": np.bool_(True),
        "windows": pathlib.PureWindowsPath("C:/x"), "took": datetime.timedelta(1), "size": torch.Size([1]),
        "optimizer": torch.optim.AdamW([nn.Parameter(torch.rand(3))]).state_dict(), "keys": {1, 2},
        "kinds": frozenset({1}), "part": slice(1, 2),
    }  # fmt: skip
    for legacy in (False, True):
        if legacy:
            torch.save(saved, loads.__closure__[0].cell_contents / "old.pth", _use_new_zipfile_serialization=False)
        assert equal(loads(None if legacy else saved, file="old.pth" if legacy else "new.pth")[0], trained)


class Config:
    """Somebody's class."""


class Runs:
    """Runs when it is unpickled."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return pathlib.Path.touch, (self.made,)


def test_other_classes_are_named_and_never_made(loads, trained, tmp_path):
    refused(loads, {"model": trained, "config": Config()}, said=r"by .*Config; .*model\.state_dict\(\)")
    refused(loads, nn.Linear(2, 2), said=r"by torch\.nn\.modules\.linear\.Linear; .*model\.state_dict\(\)")
    refused(loads, {"model": trained, "x": Runs(tmp_path / "made")}, said="by getattr; ")
    assert not (tmp_path / "made").exists()
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"w": np.zeros(3)}))
    refused(loads, None, file="plain.pth", said="another protocol")


def onnx_like(path):
    path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x032.1")


def script(path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def exported(path):
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.rand(1, 2),)), path)


class Bytes:
    """Takes half a gigabyte when it is unpickled."""

    def __reduce__(self):
        return bytearray, (2**29,)


class Numbers:
    """Takes all memory when it is unpickled."""

    def __reduce__(self):
        return frozenset, (range(10**10),)


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("w/data.pkl", b"\x80\x02}.")
        file.writestr("w/data/0", bytes(2**20))


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("weights/w.pth", "x")


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1"), "git lfs pull"),
        (lambda path: path.write_text("\n<!DOCTYPE html><html>404</html>"), "web page"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "HDF5.*Keras"),
        (lambda path: path.write_bytes(b"\x1f\x8b" + bytes(99)), "gzip"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text('{"a": 1}'), "no index of weights"),
        (lambda path: path.write_text('{"meta":{"a": 1}}'), "no index of weights"),
        (lambda path: path.write_text("[" * 10**5), "no format that is known"),
        (lambda path: path.write_text('{"a":' * 10**5), "no index of weights"),
        (lambda path: np.savez(path.open("wb"), a=np.zeros(2)), "numpy archive"),
        (onnx_like, "ONNX"),
        (script, "TorchScript.*state_dict"),
        (exported, "exported program"),
        (archive, "zip archive.*unpack"),
        (bomb, "compressed archive"),
        (
            lambda path: torch.save({"w": torch.rand(2)}, path, pickle_protocol=4),
            r"another protocol.*torch\.save\(model",
        ),
        (lambda path: path.write_bytes(pickle.dumps({"w": np.zeros(3)})), r"another protocol.*torch\.save\(model"),
        (lambda path: torch.save({"w": torch.rand(2), "x": np.array([{}])}, path), "holds more than tensors: .*Object"),
        (lambda path: torch.save(Bytes(), path), "bytearray"),
        (lambda path: torch.save(Numbers(), path), "could run code, by x?range"),
        (lambda path: torch.save([1, 2], path), "no state dict.*list"),
        (lambda path: torch.save({}, path), "no state dict.*empty"),
        (lambda path: torch.save({0: torch.rand(2), 1: torch.rand(2)}, path), "key '0' is no name"),
        (lambda path: torch.save({None: torch.rand(2)}, path), "key 'None' is no name"),
        (lambda path: torch.save({"a": torch.rand(2), b"b": torch.rand(2)}, path), "is no name"),
        (lambda path: torch.save({"model": {("a", 1): torch.rand(2)}}, path), "no state dict"),
        (lambda path: torch.save(torch.rand(2), path), "no state dict.*Tensor"),
        (lambda path: path.mkdir(), "directory without"),
    ],
)
def test_what_is_no_weights_file_is_said_in_a_line(loads, tmp_path, write, said):
    write(tmp_path / "w.pth")
    refused(loads, None, file="w.pth", said=said)


def test_a_dictionary_that_holds_itself_is_no_trouble(loads, trained):
    held = {"model": trained}
    held["again"] = held
    assert equal(loads(held)[0], trained)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_are_refused_in_a_line(data):
    import io
    import tempfile

    stream = io.BytesIO()
    torch.save({"a": torch.rand(4), "args": argparse.Namespace(x=1)}, stream)
    content = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "w.pth"
        path.write_bytes(content)
        with pytest.raises(ModelError) as error:
            create(ModelSource(f"python:{__name__}:make_norm", {}, str(path)))
        assert "\n" not in str(error.value)


# --- numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weight: weight.long(), "head.weight is of int64"),
        (lambda weight: weight > 0, "head.weight is of bool"),
        (lambda weight: weight.to(torch.complex64), "head.weight is of complex64"),
        (lambda weight: weight.to(torch.float8_e4m3fn), "head.weight is of float8"),
        (lambda weight: weight.to_sparse(), "head.weight is sparse"),
        (lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8), "head.weight is quantized"),
        (lambda weight: weight.fill_(float("nan")), "NaN or infinity: head.weight, 128 of 128"),
        (lambda weight: weight.fill_(float("inf")), "NaN or infinity: head.weight"),
        (lambda weight: weight.double() + 1e300, "NaN or infinity: head.weight"),  # float32 ends before
    ],
)
def test_numbers_that_are_no_weights_are_refused_by_name(loads, trained, change, said):
    refused(loads, {**trained, "head.weight": change(trained["head.weight"].clone())}, said=said)


def test_a_mask_that_is_saved_with_the_weights_may_be_infinite_but_not_nan(loads):
    name = f"python:{__name__}:make_masked"
    state = make_masked().state_dict()
    assert equal(loads(state, name, {})[0], state)
    refused(loads, {**state, "mask": torch.full((2, 2), float("nan"))}, name, {}, said="NaN or infinity: mask, 4 of 4")


def test_what_a_model_counts_are_whole_numbers(loads):
    name = f"python:{__name__}:make_norm"
    state = create(ModelSource(name, {}, "random")).state_dict()
    counted = {**state, "1.num_batches_tracked": torch.tensor(3.5)}
    refused(loads, counted, name, {}, said="1.num_batches_tracked is of float32 where the model counts")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_precisions_become_float32(loads, trained, dtype):
    found, _ = loads({key: value.to(dtype) for key, value in trained.items()})
    assert equal(found, {key: value.to(dtype).float() for key, value in trained.items()})


# --- what does not fit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "asked", "said"),
    [
        (TIMM, ONE_BLOCK, "num_classes", "--model-arg num_classes=4"),
        ("transformers:vit", TINY_VIT, "num_labels", "--model-arg num_labels=4"),
        ("transformers:deit", TINY_VIT, "num_labels", "--model-arg num_labels=4"),
        ("timm:deit_tiny_distilled_patch16_224", ONE_BLOCK, "num_classes", "--model-arg num_classes=4"),
    ],
)
def test_another_number_of_classes_is_told_how_to_ask_for(loads, name, arguments, asked, said):
    state = create(ModelSource(name, arguments, "random")).state_dict()
    refused(loads, state, name, {**arguments, asked: 7}, said=said)


def test_a_head_of_another_name_and_a_backbone_beside_other_heads_are_told_apart(loads, trained):
    renamed = {key.replace("head.", "fc."): tensor for key, tensor in trained.items()}
    refused(loads, renamed, said="the classifier is called fc in the file, and head in the model")
    backbone = {f"module.backbone.{key}": tensor for key, tensor in trained.items() if not key.startswith("head.")}
    refused(loads, {**backbone, "module.head.mlp.0.weight": torch.rand(2, 2)}, said="2 missing.*has no classifier")


def test_a_distilled_model_and_a_model_without_head_are_told_apart(loads, trained):
    distilled = create(ModelSource("timm:deit_tiny_distilled_patch16_224", ONE_BLOCK, "random")).state_dict()
    refused(loads, distilled, said="distilled model, which has two heads")
    refused(loads, {k: v for k, v in trained.items() if not k.startswith("head")}, said="no classifier")


def test_the_head_of_a_file_is_left_out_of_a_model_that_is_asked_for_without(loads, trained):
    headless = {**ONE_BLOCK, "num_classes": 0}
    body = {key: tensor for key, tensor in trained.items() if not key.startswith("head.")}
    found, notes = loads(trained, TIMM, headless)
    assert equal(found, body)
    assert notes[0].endswith("left out, as the model has no head: head.weight, head.bias")
    assert loads(body, TIMM, headless)[1] == []
    refused(loads, {**trained, "more.weight": torch.rand(2)}, TIMM, headless, said="unexpected: .*more.weight")
    refused(loads, {**trained, "head.other.weight": torch.rand(2)}, said="unexpected: head.other.weight")


def make_two():
    """A user's factory, of layers in a module."""
    return nn.Sequential(OrderedDict(body=nn.Linear(4, 4), head=nn.Linear(4, 2)))


@pytest.mark.parametrize("layer", ["body", "head"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (nn.utils.weight_norm, r"weight-normalized: torch.nn.utils.remove_weight_norm\(module, 'weight'\)"),
        (nn.utils.spectral_norm, r"spectral-normalized: torch.nn.utils.remove_spectral_norm\(module, 'weight'\)"),
        (parametrizations.weight_norm, r"parametrized, .*parametrize.remove_parametrizations\(module, 'weight'\)"),
        (parametrizations.spectral_norm, r"parametrized, .*parametrize.remove_parametrizations\(module, 'weight'\)"),
        (lambda part: prune.random_unstructured(part, "weight", 1), r"pruned: torch.nn.utils.prune.remove\(module, 'w"),
        (lambda part: prune.random_unstructured(part, "bias", 1), r"pruned: torch.nn.utils.prune.remove\(module, 'b"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_weight_in_parts_is_told_how_to_become_one(loads, layer, change, said):
    model = make_two()
    change(getattr(model, layer))
    refused(loads, model.state_dict(), f"python:{__name__}:make_two", {}, said=f"; {layer}.(weight|bias) is {said}")


@pytest.mark.parametrize("name", ["base_layer.weight", "lora_A.default.weight", "lora_A", "lora_embedding_B.default"])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_adapters_are_told_to_be_merged(loads, name, prefix):
    state = {"body.weight": torch.rand(4, 4), "body.bias": torch.rand(4), "head.bias": torch.rand(2)}
    state = under(prefix, {**state, f"head.{name}": torch.rand(2, 4)})
    said = rf"head.{name} is of an adapter .*merge_and_unload\(\)"
    refused(loads, state, f"python:{__name__}:make_two", {}, said=said)


@pytest.mark.parametrize("lacking", ["bias", "weight"])
def test_a_head_that_lacks_a_part_is_a_classifier(loads, trained, lacking):
    there = "weight" if lacking == "bias" else "bias"
    state = {key: tensor for key, tensor in trained.items() if key != f"head.{lacking}"}
    refused(loads, state, said=f"1 missing: head.{lacking}; the classifier is there in part, head.{there}: save")
    pooled = {**ONE_BLOCK, "global_pool": "avg"}
    state = create(ModelSource(TIMM, pooled, "random")).state_dict()
    state = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    refused(loads, state, TIMM, pooled, said="has no classifier")  # fc_norm is none


@pytest.mark.parametrize(
    ("name", "small", "large", "key"),
    [
        (TIMM, ONE_BLOCK, {**ONE_BLOCK, "img_size": 64}, "pos_embed"),
        ("timm:deit_tiny_distilled_patch16_224", ONE_BLOCK, {**ONE_BLOCK, "img_size": 64}, "pos_embed"),
        ("transformers:vit", TINY_VIT, {**TINY_VIT, "image_size": 64}, "vit.embeddings.position_embeddings"),
        ("transformers:deit", TINY_VIT, {**TINY_VIT, "image_size": 64}, "deit.embeddings.position_embeddings"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_positions_of_another_size_are_resampled_by_the_library_and_said(loads, name, small, large, key, prefix):
    state = create(ModelSource(name, small, "random", seed=9)).state_dict()
    found, notes = loads(under(prefix, state), name, large)
    assert found[key].shape != state[key].shape
    assert len(notes) == 1
    assert f"resampled by {name.partition(':')[0]}: {key} {list(state[key].shape)}" in notes[0]
    assert all(torch.equal(found[other], state[other]) for other in state if other != key)
    # a table of equal rows stays one, whatever the interpolation
    flat = {**state, key: torch.ones_like(state[key])}
    assert torch.allclose(loads(under(prefix, flat), name, large)[0][key], torch.tensor(1.0), atol=1e-5)


def test_positions_of_another_order_of_size_are_refused_without_resampling(loads, trained, monkeypatch):
    never = "vitquant.zoo.weights.converted_by_library"
    monkeypatch.setattr(never, lambda *_: pytest.fail("it was resampled"))
    huge = torch.zeros(1).expand(1, 1001**2 + 1, 32)  # one number in the file
    refused(loads, {**trained, "pos_embed": huge}, said="of another shape: pos_embed")


def test_torchvision_resamples_its_positions(loads, monkeypatch):
    import torchvision

    def build(image_size, **_):
        return torchvision.models.VisionTransformer(image_size, 8, 1, 2, 16, 32, num_classes=4)

    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights=None, **arguments: build(**arguments))
    state = create(ModelSource(TV, {"image_size": 32}, "random")).state_dict()
    found, notes = loads(state, TV, {"image_size": 64})
    assert found["encoder.pos_embedding"].shape == (1, 65, 16)
    old = {key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): state[key] for key in state}
    assert old.keys() != state.keys()  # as torchvision's files on the web have them
    assert equal(loads(old, TV, {"image_size": 32})[0], state)
    assert "resampled by torchvision: encoder.pos_embedding" in notes[0]


def test_positions_without_a_function_of_the_library_are_refused_by_their_sizes(loads, monkeypatch):
    import torchvision

    def build(window_size, **_):
        return torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [window_size] * 2, num_classes=4)

    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights=None, **arguments: build(**arguments))
    state = create(ModelSource("torchvision:swin_t", {"window_size": 4}, "random")).state_dict()
    refused(loads, state, "torchvision:swin_t", {"window_size": 8}, said=r"another shape.*relative_position.*\[49, 2\]")


OF_VERSION_4 = {
    "vit.layers.": "vit.encoder.layer.", "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key", "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
}  # fmt: skip


def test_files_of_transformers_4_are_read_by_transformers_5(loads):
    state = create(ModelSource("transformers:vit", TINY_VIT, "random", seed=9)).state_dict()
    old = state
    for new, before in OF_VERSION_4.items():
        old = {key.replace(new, before): tensor for key, tensor in old.items()}
    found, _ = loads(under("module.", old), "transformers:vit", TINY_VIT)
    assert equal(found, state)
    key = "vit.embeddings.position_embeddings"
    found, notes = loads(old, "transformers:vit", {**TINY_VIT, "image_size": 64})
    assert all(torch.equal(found[other], state[other]) for other in state if other != key)
    assert f"resampled by transformers: {key}" in notes[0]


def test_other_names_are_converted_by_the_library(loads, trained):
    """OpenCLIP's prefix, which timm knows, and a base model's file, which transformers knows."""
    found, _ = loads({**under("visual.trunk.", trained), "logit_scale": torch.rand(2)})
    assert equal(found, trained)
    state = create(ModelSource("transformers:vit", TINY_VIT, "random", seed=9)).state_dict()
    base = {k.removeprefix("vit."): v for k, v in state.items() if k.startswith("vit.")}
    refused(loads, base, "transformers:vit", TINY_VIT, said="2 missing: classifier.*no classifier")

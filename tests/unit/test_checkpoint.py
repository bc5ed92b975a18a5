import json

import pytest
import torch

from vitquant.errors import CheckpointError
from vitquant.model.checkpoint import (
    CONFIG,
    EXPORTED,
    SAVED_MODEL,
    TENSORS,
    read_checkpoint,
    read_config,
    write_checkpoint,
)

TENSOR = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.uint8)}


@pytest.fixture
def saved(tmp_path):
    write_checkpoint(tmp_path / "out", TENSOR, {"note": "x"})
    return tmp_path / "out"


def test_what_is_written_is_read(saved):
    tensors, config = read_checkpoint(saved)
    assert config["note"] == "x"
    assert tensors.keys() == TENSOR.keys()
    for name, tensor in TENSOR.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_the_same_content_gives_the_same_bytes(saved, tmp_path):
    write_checkpoint(tmp_path / "again", TENSOR, {"note": "x"})
    for name in (TENSORS, CONFIG):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("size", [0, 7, 40, -1])
def test_truncated_tensors_are_refused(saved, size):
    path = saved / TENSORS
    path.write_bytes(path.read_bytes()[: size if size >= 0 else -1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors holds \d+ bytes of \d+: it was truncated"):
        read_checkpoint(saved)


def test_one_altered_bit_of_the_tensors_is_refused(saved):
    path = saved / TENSORS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="altered since it was saved"):
        read_checkpoint(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(note="y"), "its digest differs"),
        (lambda config: config.pop("digest"), "its digest differs"),
        (lambda config: config.update(format=99), "format 99, newer than 2: update vitquant"),
        (lambda config: config.pop("format"), "no format number"),
    ],
)
def test_an_altered_config_is_refused(saved, change, message):
    config = json.loads((saved / CONFIG).read_text())
    change(config)
    (saved / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        read_config(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "1"}', "\x00"])
def test_a_config_that_is_none_is_refused_by_name(saved, text):
    (saved / CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(saved)


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(saved)


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="absent"):
        read_config(tmp_path / "absent")


def test_nothing_is_overwritten_without_force(saved):
    with pytest.raises(CheckpointError, match=r"not empty.*--force"):
        write_checkpoint(saved, TENSOR, {"note": "new"})
    assert read_config(saved)["note"] == "x"
    write_checkpoint(saved, TENSOR, {"note": "new"}, force=True)
    assert read_config(saved)["note"] == "new"
    assert [path.name for path in saved.parent.iterdir()] == ["out"]


def test_force_does_not_delete_what_is_no_saved_model(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds no saved model"):
        write_checkpoint(tmp_path / "out", TENSOR, {}, force=True)
    write_checkpoint(tmp_path / "other", TENSOR, {})
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds thesis\.tex, which is not of a saved model"):
        write_checkpoint(tmp_path / "other", TENSOR, {}, force=True)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        write_checkpoint(tmp_path / "file", TENSOR, {}, force=True)
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_checkpoint(tmp_path / "file" / "out", TENSOR, {})


def test_a_float_model_of_another_library_is_no_saved_model(tmp_path):
    """transformers writes directories with the same two names."""
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / TENSORS).write_bytes(b"weeks of training")
    (tmp_path / "vit" / CONFIG).write_text('{"model_type": "vit"}')
    with pytest.raises(CheckpointError, match="holds no saved model"):
        write_checkpoint(tmp_path / "vit", TENSOR, {}, force=True)


def test_what_was_exported_goes_with_its_model(saved):
    from vitquant.exports.formats import FORMATS

    assert {format.path for format in FORMATS.values()} == EXPORTED.keys() <= SAVED_MODEL.layout.keys()
    for name, layout in EXPORTED.items():
        (saved / name).mkdir() if layout else (saved / name).write_text("")
    write_checkpoint(saved, TENSOR, {}, force=True)
    assert sorted(path.name for path in saved.iterdir()) == sorted([CONFIG, TENSORS])


@pytest.mark.parametrize("step", ["save_file", "exchange"])
def test_a_write_that_fails_leaves_what_was_there(saved, monkeypatch, step):
    def refuse(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        "safetensors.torch.save_file" if step == "save_file" else "vitquant.files.writing.exchange", refuse
    )
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_checkpoint(saved, TENSOR, {"note": "new"}, force=True)
    monkeypatch.undo()
    assert read_checkpoint(saved)[1]["note"] == "x"
    assert [path.name for path in saved.parent.iterdir()] == ["out"]

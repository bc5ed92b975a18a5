"""A file is there whole, or it is what it was."""

import os
import stat

import pytest
import torch

from vitquant.checkpoint import write_checkpoint
from vitquant.errors import ExportError
from vitquant.files import check_new_file, write_file


def test_a_file_is_written_and_replaced_only_when_asked(tmp_path):
    path = tmp_path / "new" / "a.bin"
    write_file(path, b"one")
    with pytest.raises(ExportError, match=r"a\.bin exists; .*--force \(force=True\)"):
        write_file(path, b"two")
    assert path.read_bytes() == b"one"
    write_file(path, b"two", force=True)
    assert path.read_bytes() == b"two"
    assert [each.name for each in path.parent.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_are_those_that_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_file(tmp_path / "a.bin", b"one")
        write_checkpoint(tmp_path / "out", {"a": torch.zeros(3)}, {})
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes.pop("out") == 0o777 & ~umask
    assert modes == dict.fromkeys(("a.bin", "model.safetensors", "config.json"), 0o666 & ~umask)


def test_a_directory_or_a_place_that_cannot_be_written_is_refused_beforehand(tmp_path):
    with pytest.raises(ExportError, match="is a directory"):
        check_new_file(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        check_new_file(tmp_path / "file" / "below")


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitquant.files.os.fsync", full)
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with pytest.raises(ExportError, match="No space left"):
        write_file(path, b"after", force=True)
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["a.bin"]

"""States of long work: whole or not there, of one run, and refused in one line when they are anything else."""

from __future__ import annotations

import pytest
import torch

from vitquant.errors import CheckpointError
from vitquant.work import WorkDirectory, WorkState

RUN = {"model": "a", "recipe": {"name": "b"}, "seed": 0}


def test_what_is_written_is_read(tmp_path) -> None:
    tensors = {"x/y:z": torch.arange(5), "scale": torch.tensor(0.1)}
    with WorkDirectory.opened(tmp_path / "work", RUN) as work:
        assert work.read("one") is None
        work.write("one", tensors, {"done": [1, 2]})
    with WorkDirectory.opened(tmp_path / "work", RUN) as work:
        found = work.read("one")
        assert found is not None
        assert found[1] == {"done": [1, 2]}
        assert all(torch.equal(found[0][key], tensor) for key, tensor in tensors.items())
        work.remove("one")
        assert work.read("one") is None
    assert [each.name for each in (tmp_path / "work").iterdir()] == ["run.json"]


@pytest.mark.parametrize("key", RUN)
def test_another_run_s_is_refused(tmp_path, key: str) -> None:
    with WorkDirectory.opened(tmp_path, RUN):
        pass
    with (
        pytest.raises(CheckpointError, match=f"another run, with another {key}; give another, or remove"),
        WorkDirectory.opened(tmp_path, {**RUN, key: "other"}),
    ):
        pass


def test_a_directory_in_use_is_refused(tmp_path) -> None:
    with (
        WorkDirectory.opened(tmp_path, RUN),
        pytest.raises(CheckpointError, match="another run is writing"),
        WorkDirectory.opened(tmp_path, RUN),
    ):
        pass


def test_a_directory_of_something_else_is_refused(tmp_path) -> None:
    (tmp_path / "photo.png").touch()
    with pytest.raises(CheckpointError, match=r"holds photo\.png"), WorkDirectory.opened(tmp_path, RUN):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be used"), WorkDirectory.opened(tmp_path / "file", RUN):
        pass


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, b"\x08" + b"\0" * 7 + b"{}      ", None])
def test_a_damaged_state_is_refused(tmp_path, content: bytes | None) -> None:
    with WorkDirectory.opened(tmp_path, RUN) as work:
        work.write("one", {"x": torch.arange(100)}, {})
        file = tmp_path / "one.safetensors"
        file.write_bytes(file.read_bytes()[:-10] if content is None else content)
        with pytest.raises(CheckpointError, match="is damaged: remove it"):
            work.read("one")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model": NaN}'])
def test_a_damaged_mark_is_refused(tmp_path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError) as refused, WorkDirectory.opened(tmp_path, RUN):
        pass
    assert "\n" not in str(refused.value)


def test_without_a_directory_nothing_is_kept() -> None:
    state = WorkState()
    state.save({}, {})
    assert (state.load(), state.due) == (None, False)

"""States of long work: whole or not there, of one run, and refused in one line when they are anything else."""

from __future__ import annotations

import math

import pytest
import torch

from vitquant.errors import CheckpointError
from vitquant.schema import Integer, Plain, Table
from vitquant.work import WorkDirectory, WorkState

RUN = {"model": "a", "recipe": {"name": "b"}, "seed": 0}


def test_what_is_written_is_read(tmp_path) -> None:
    tensors = {"x/y:z": torch.arange(5), "scale": torch.tensor(0.1)}
    with WorkDirectory.opened(tmp_path / "work", RUN) as work:
        assert work.read("one", Plain()) is None
        work.write("one", tensors, {"done": [1, 2]})
    with WorkDirectory.opened(tmp_path / "work", RUN) as work:
        found = work.read("one", Plain())
        assert found is not None
        assert found.values == {"done": [1, 2]}
        assert all(torch.equal(found.tensor(key, tensor), tensor) for key, tensor in tensors.items())
        work.remove("one")
        assert work.read("one", Plain()) is None
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
            work.read("one", Plain())


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model": NaN}'])
def test_a_damaged_mark_is_refused(tmp_path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError) as refused, WorkDirectory.opened(tmp_path, RUN):
        pass
    assert "\n" not in str(refused.value)


def test_without_a_directory_nothing_is_kept() -> None:
    state = WorkState()
    state.save({}, {})
    assert (state.load(Plain()), state.due) == (None, False)


@pytest.mark.parametrize("found", [torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.tensor([1, torch.nan])])
def test_a_tensor_that_is_not_as_it_has_to_be_is_refused(tmp_path, found: torch.Tensor) -> None:
    with WorkDirectory.opened(tmp_path, RUN) as work:
        work.write("one", {"x": found}, {})
        saved = work.read("one", Plain())
        assert saved is not None
        for key in ("x", "y"):
            with pytest.raises(CheckpointError, match="is damaged: remove it"):
                saved.tensor(key, torch.zeros(2))


def test_values_are_what_their_schema_says(tmp_path) -> None:
    with WorkDirectory.opened(tmp_path, RUN) as work:
        work.write("one", {}, {"done": -1})
        with pytest.raises(CheckpointError, match="is damaged: remove it"):
            work.read("one", Table({"done": Integer(0)}))


def test_what_fails_inside_is_no_fault_of_the_directory(tmp_path) -> None:
    with pytest.raises(ValueError, match="mine"), WorkDirectory.opened(tmp_path, RUN):
        raise ValueError("mine")
    with pytest.raises(FileNotFoundError), WorkDirectory.opened(tmp_path, RUN):
        (tmp_path / "photo.png").read_bytes()


def test_saving_that_takes_long_is_done_seldom(tmp_path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("vitquant.work.time.monotonic", lambda: now[0])
    with WorkDirectory.opened(tmp_path, RUN) as work:
        state = WorkState(work, "one")

        def write(*_: object) -> None:
            now[0] += 60

        monkeypatch.setattr(WorkDirectory, "write", write)
        state.save({}, {})
        now[0] += 1000
        assert not state.due  # a minute in twenty
        now[0] += 200
        assert state.due


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", -1.0), ("step", 0.0), ("step", 1.5), ("step", math.nan), ("exp_avg_sq", -1e-9), ("exp_avg", math.inf)],
)
def test_a_state_that_adam_cannot_have_is_damaged(tmp_path, key: str, value: float) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.arange(6.0).view(2, 3)
    optimizer.step()
    state = optimizer.state[parameter]
    with WorkDirectory.opened(tmp_path, RUN) as work:
        work.write("one", {f"adam/{name}": each for name, each in state.items()}, {})
        found = work.read("one", Plain())
        assert found is not None
        assert found.adam("others", parameter) == {}
        restored = found.adam("adam", parameter)
        assert {name: each.tolist() for name, each in restored.items()} == {k: v.tolist() for k, v in state.items()}
        work.write(
            "one", {f"adam/{name}": torch.full_like(x, value) if name == key else x for name, x in state.items()}, {}
        )
        forged = work.read("one", Plain())
        assert forged is not None
        with pytest.raises(CheckpointError, match="is damaged: remove it"):
            forged.adam("adam", parameter)

"""Saved states of long work, so that a run that was killed can be continued."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitquant.errors import CheckpointError
from vitquant.files import write_file
from vitquant.files.claim import claimed
from vitquant.files.refusal import told_as
from vitquant.parsing import parse_json, read_file
from vitquant.schema import Schema, check

FORMAT = 1  # of states
_RUN = "run.json"
_EVERY = 20.0  # the least number of seconds between two saved states of one piece of work
_SHARE = 0.05  # the share of the time that saving may take
_KEY = "values"
_LONGEST_RUN = 2**20  # bytes
_LARGEST = 2**36


@dataclass(frozen=True)
class Saved:
    """A saved state, which may come from any file.

    Arguments:
        tensors: by name, on the CPU; unchecked, see `tensor`.
        values: plain values that fit the schema with which they were read.
        file: the file of the state.
    """

    tensors: dict[str, Tensor]
    values: Any
    file: Path

    def tensor(self, key: str, like: Tensor) -> Tensor:
        """A tensor, after checking that its shape and dtype are those of another, moved to the other's device.

        Raises:
            CheckpointError: it is missing, has another shape or dtype, or holds NaN or infinity.
        """
        found = self.tensors.get(key)
        if found is None or found.shape != like.shape or found.dtype != like.dtype:
            raise self.damaged()
        if found.is_floating_point() and not bool(torch.isfinite(found).all()):
            raise self.damaged()
        return found.to(like.device)

    def adam(self, prefix: str, parameter: Tensor) -> dict[str, Tensor]:
        """The state of Adam for a parameter, as `torch.optim.Adam` holds it; empty if there is none.

        Arguments:
            prefix: of its keys, such as `adam/3`.
            parameter: whose shape, dtype and device the moments have.

        Raises:
            CheckpointError: a tensor is not valid, the number of steps is none, or a second moment is negative.
        """
        if f"{prefix}/step" not in self.tensors:  # Adam has no state for parameters without gradient
            return {}
        step, like = self.tensor(f"{prefix}/step", torch.zeros(())), parameter.detach()
        moments = {key: self.tensor(f"{prefix}/{key}", like) for key in ("exp_avg", "exp_avg_sq")}
        if step.item() < 1 or step.item() % 1 or bool((moments["exp_avg_sq"] < 0).any()):
            raise self.damaged()
        return {"step": step, **moments}

    def damaged(self) -> CheckpointError:
        """The error for a state that is not valid."""
        return CheckpointError(f"{self.file} is damaged: remove it, and what it holds is computed again")


@dataclass(frozen=True)
class WorkDirectory:
    """A directory of saved states by name, each a file that is written atomically.

    Use `opened` to create one.
    """

    path: Path

    @classmethod
    @contextmanager
    def opened(cls, path: str | Path, run: Mapping[str, Any]) -> Generator[WorkDirectory]:
        """The work directory of a run, created when missing; only one run at a time can use it.

        Arguments:
            path: of the directory.
            run: the identity of the run, plain JSON values: a directory of another run is refused.

        Raises:
            CheckpointError: the directory belongs to another run, and the message names a difference; it is in use or
                holds something else; or the operating system refuses.
        """
        path = Path(path)
        with ExitStack() as held:
            with told_as(CheckpointError, f"the work directory {path} cannot be used"):
                path.mkdir(parents=True, exist_ok=True)
                held.enter_context(claimed(path))
                _check(path, json.loads(json.dumps({"format": FORMAT, **run})))
            yield cls(path)

    def read(self, name: str, schema: Schema) -> Saved | None:
        """The tensors and values that were written under a name; None if there are none.

        Arguments:
            name: of the state.
            schema: of its values.

        Raises:
            CheckpointError: the file is damaged.
        """
        file = self._file(name)
        if not file.exists():
            return None
        torch_files = _safetensors()
        try:
            content = read_file(file, _LARGEST, CheckpointError)
            tensors = torch_files.load(content)
            header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")], CheckpointError)
            values = check(parse_json(header["__metadata__"][_KEY], CheckpointError), schema, CheckpointError)
        except Exception as error:
            raise Saved({}, None, file).damaged() from error
        return Saved(tensors, values, file)

    def write(self, name: str, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Write tensors and plain JSON values under a name, replacing the previous state of that name.

        Raises:
            ExportError: the file cannot be written.
        """
        held = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        write_file(self._file(name), _safetensors().save(held, {_KEY: json.dumps(values)}), force=True)

    def remove(self, name: str) -> None:
        """Remove the state of a name, if there is one."""
        with told_as(CheckpointError, f"{self._file(name)} cannot be removed"):
            self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"


@dataclass
class WorkState:
    """The saved state of one piece of work, such as a method of a recipe; without a directory nothing is saved.

    Arguments:
        directory: where the state is saved.
        name: of the work.
    """

    directory: WorkDirectory | None = None
    name: str = ""
    _next: float = field(default_factory=lambda: time.monotonic() + _EVERY, repr=False)

    @property
    def due(self) -> bool:
        """Whether it is time to save: at least 20 seconds after the last time, or more if saving takes long."""
        return self.directory is not None and time.monotonic() >= self._next

    def load(self, schema: Schema) -> Saved | None:
        """The state that `save` wrote last; None if there is none.

        Arguments:
            schema: of its values.

        Raises:
            CheckpointError: the file is damaged.
        """
        return None if self.directory is None else self.directory.read(self.name, schema)

    def save(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Save the tensors and plain JSON values with which the work can be continued."""
        if self.directory is not None:
            started = time.monotonic()
            self.directory.write(self.name, tensors, values)
            ended = time.monotonic()
            self._next = ended + max(_EVERY, (ended - started) / _SHARE)

    def remove(self) -> None:
        """Remove what `save` wrote, if anything."""
        if self.directory is not None:
            self.directory.remove(self.name)


def has_begun(path: Path) -> bool:
    """Whether a run has begun in a work directory, or in one inside of it: of a process, or of what is done before."""
    return (path / _RUN).is_file() or any(path.glob(f"*/{_RUN}"))


def _check(path: Path, run: dict[str, Any]) -> None:
    """Refuse the directory of another run, and record the identity of this run in a new one."""
    file = path / _RUN
    if not file.exists():
        others = [each.name for each in path.iterdir() if not each.name.startswith(".")]
        if others:
            raise CheckpointError(
                f"{path} holds {others[0]} and is not a work directory; give another, or an empty one"
            )
        write_file(file, json.dumps(run, indent=1).encode())
        return
    found = parse_json(read_file(file, _LONGEST_RUN, CheckpointError), CheckpointError)
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is damaged; remove {path}")
    other = [key for key in run if found.get(key) != run[key]] + [key for key in found if key not in run]
    if other:
        raise CheckpointError(
            f"{path} is the work directory of another run, with another {other[0]}; give another, or remove it"
        )


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError("states are saved by safetensors: pip install 'vitquant[checkpoint]'") from error
    return safetensors.torch

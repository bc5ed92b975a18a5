"""Where long work keeps what it has, so that a run that was killed goes on where it was."""

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
_EVERY = 20.0  # seconds between two states of one piece of work, at least
_SHARE = 0.05  # of the time that saving may take
_KEY = "values"
_LONGEST_RUN = 2**20  # bytes
_LARGEST = 2**36


@dataclass(frozen=True)
class Saved:
    """What was kept under a name, whoever wrote the file.

    Arguments:
        tensors: by name, on the CPU; `tensor` checks them.
        values: what the schema says that was asked for.
        file: where they are.
    """

    tensors: dict[str, Tensor]
    values: Any
    file: Path

    def tensor(self, key: str, like: Tensor) -> Tensor:
        """A tensor that has to be as another one is, on its device.

        Raises:
            CheckpointError: it is missing, of another shape or dtype, or holds NaN or infinity.
        """
        found = self.tensors.get(key)
        if found is None or found.shape != like.shape or found.dtype != like.dtype:
            raise self.damaged()
        if found.is_floating_point() and not bool(torch.isfinite(found).all()):
            raise self.damaged()
        return found.to(like.device)

    def damaged(self) -> CheckpointError:
        """The error for a state that is not what it should be."""
        return CheckpointError(f"{self.file} is damaged: remove it, and what it holds is computed again")


@dataclass(frozen=True)
class WorkDirectory:
    """A directory of states by name, each a file that is written whole or not at all.

    Use `opened` to make one.
    """

    path: Path

    @classmethod
    @contextmanager
    def opened(cls, path: str | Path, run: Mapping[str, Any]) -> Generator[WorkDirectory]:
        """The work directory of a run, made when missing; one run at a time has it.

        Arguments:
            path: of the directory.
            run: what tells runs apart, plain JSON values: a directory of another run is refused.

        Raises:
            CheckpointError: it is of another run, which the message names, is in use, holds something else, or the
                operating system refuses.
        """
        path = Path(path)
        with ExitStack() as held:
            with told_as(CheckpointError, f"the work directory {path} cannot be used"):
                path.mkdir(parents=True, exist_ok=True)
                held.enter_context(claimed(path))
                _check(path, json.loads(json.dumps({"format": FORMAT, **run})))
            yield cls(path)

    def read(self, name: str, schema: Schema) -> Saved | None:
        """The tensors and values that were written under a name; None where nothing was.

        Arguments:
            name: of the state.
            schema: what its values may be.

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
        """Write tensors, and plain JSON values, in the place of what has that name.

        Raises:
            ExportError: the file cannot be written.
        """
        held = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        write_file(self._file(name), _safetensors().save(held, {_KEY: json.dumps(values)}), force=True)

    def remove(self, name: str) -> None:
        """Forget what has that name."""
        with told_as(CheckpointError, f"{self._file(name)} cannot be removed"):
            self._file(name).unlink(missing_ok=True)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"


@dataclass
class WorkState:
    """The state of one piece of work, such as a method of a recipe; without a directory nothing is kept.

    Arguments:
        directory: where it is kept.
        name: of the work.
    """

    directory: WorkDirectory | None = None
    name: str = ""
    _next: float = field(default_factory=lambda: time.monotonic() + _EVERY, repr=False)

    @property
    def due(self) -> bool:
        """Whether it is time to save: some seconds have passed since the last time, more where saving takes long."""
        return self.directory is not None and time.monotonic() >= self._next

    def load(self, schema: Schema) -> Saved | None:
        """What `save` wrote last; None where it wrote nothing.

        Arguments:
            schema: what its values may be.

        Raises:
            CheckpointError: the file is damaged.
        """
        return None if self.directory is None else self.directory.read(self.name, schema)

    def save(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Keep what the work needs to go on: tensors, and plain JSON values."""
        if self.directory is not None:
            started = time.monotonic()
            self.directory.write(self.name, tensors, values)
            ended = time.monotonic()
            self._next = ended + max(_EVERY, (ended - started) / _SHARE)


def _check(path: Path, run: dict[str, Any]) -> None:
    """Refuse a directory that another run made, and mark a new one as this run's."""
    file = path / _RUN
    if not file.exists():
        others = [each.name for each in path.iterdir() if not each.name.startswith(".")]
        if others:
            raise CheckpointError(f"{path} holds {others[0]} and is no work directory; give another, or an empty one")
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

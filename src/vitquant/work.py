"""Where long work keeps what it has, so that a run that was killed goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vitquant.errors import CheckpointError
from vitquant.files import write_file
from vitquant.files.claim import claimed
from vitquant.files.refusal import told_as
from vitquant.parsing import parse_json, read_file

Saved = tuple[dict[str, Tensor], Any]

_RUN = "run.json"
_EVERY = 20.0  # seconds between two states of one piece of work
_KEY = "values"
_LONGEST_RUN = 2**20  # bytes
_LARGEST = 2**36


@dataclass(frozen=True)
class WorkDirectory:
    """A directory of states by name, each a file that is written whole or not at all.

    Use `opened` to make one.
    """

    path: Path

    @classmethod
    @contextmanager
    def opened(cls, path: str | Path, run: Mapping[str, Any]) -> Iterator[WorkDirectory]:
        """The work directory of a run, made when missing; one run at a time has it.

        Arguments:
            path: of the directory.
            run: what tells runs apart, plain JSON values: a directory of another run is refused.

        Raises:
            CheckpointError: it is of another run, which the message names, is in use, holds something else, or the
                operating system refuses.
        """
        path = Path(path)
        with told_as(CheckpointError, f"the work directory {path} cannot be used"):
            path.mkdir(parents=True, exist_ok=True)
            with claimed(path):
                _check(path, json.loads(json.dumps(run)))
                yield cls(path)

    def read(self, name: str) -> Saved | None:
        """The tensors and values that were written under a name; None where nothing was.

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
            return tensors, parse_json(header["__metadata__"][_KEY], CheckpointError)
        except Exception as error:
            raise CheckpointError(f"{file} is damaged: remove it, and what it holds is computed again") from error

    def write(self, name: str, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Write tensors, and plain JSON values, in the place of what has that name.

        Raises:
            ExportError: the file cannot be written.
        """
        held = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        write_file(self._file(name), _safetensors().save(held, {_KEY: json.dumps(values)}), force=True)

    def remove(self, name: str) -> None:
        """Forget what has that name."""
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
    _last: float = field(default_factory=time.monotonic, repr=False)

    @property
    def due(self) -> bool:
        """Whether it is time to save: some seconds have passed since the last time."""
        return self.directory is not None and time.monotonic() - self._last >= _EVERY

    def load(self) -> Saved | None:
        """What `save` wrote last; None where it wrote nothing.

        Raises:
            CheckpointError: the file is damaged.
        """
        return None if self.directory is None else self.directory.read(self.name)

    def save(self, tensors: Mapping[str, Tensor], values: Any) -> None:
        """Keep what the work needs to go on: tensors, and plain JSON values."""
        if self.directory is not None:
            self.directory.write(self.name, tensors, values)
            self._last = time.monotonic()


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

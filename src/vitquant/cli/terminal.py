"""The output of a command: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from vitquant.cli.interrupts import InterruptedAfterWritingError
from vitquant.cli.widths import LEAST
from vitquant.files import Directory, identity, replacing
from vitquant.printable import one_line

_FILE_WIDTH = 140  # columns of a table that goes to a file or a pipe


class Terminal:
    """The output of one command; inside its `with`, other prints to stdout are redirected to stderr.

    Arguments:
        json: whether the result is printed as one JSON object, with nothing else on stdout.
        quiet: whether to print only that object and errors.
    """

    def __init__(self, json: bool, quiet: bool) -> None:
        self._json, self._quiet = json, quiet
        self._stdout = sys.stdout
        self._stderr = Console(file=sys.stderr)
        self._outputs: dict[Path, tuple[int, int] | None] = {}
        self._work: Path | None = None

    def __enter__(self) -> Terminal:
        self._redirection = redirect_stdout(sys.stderr)  # a library or a user's factory may print
        self._redirection.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._redirection.__exit__(kind, error, trace)
        written = [str(path) for path, before in self._outputs.items() if identity(path) not in (before, None)]
        if written and isinstance(error, KeyboardInterrupt):
            raise InterruptedAfterWritingError(f"interrupted; {', '.join(written)} was written") from error
        if self._work is not None and isinstance(error, KeyboardInterrupt):
            from vitquant.work import has_begun  # imports torch, as every command with such a directory has done

            if has_begun(self._work):
                kept = f"interrupted; {self._work} keeps what was done, and the same command continues there"
                raise InterruptedAfterWritingError(kept) from error

    @contextmanager
    def replacing(self, path: Path, force: bool, directory: Directory | None = None) -> Generator[Path]:
        """`vitquant.files.replacing`, recorded so that an interrupt reports whether the output was written."""
        with replacing(path, force, directory) as new:
            self._outputs[path] = identity(path)
            yield new

    def continuing(self, work: Path | None) -> None:
        """Record the work directory, if there is one, so that an interrupt names it."""
        self._work = work

    def result(self, values: Mapping[str, Any], *tables: RenderableType) -> None:
        """Print the result: its values as JSON, or the tables; a string is printed as one line of any width."""
        if self._json:
            print(json.dumps(values, indent=2, allow_nan=False), file=self._stdout)
        elif not self._quiet:
            console = Console(file=self._stdout, width=_width(self._stdout), markup=False, highlight=False)
            console.width = max(console.width, LEAST)
            for table in tables:
                console.print(table, soft_wrap=isinstance(table, str))

    def note(self, text: str) -> None:
        """Print a note for the user on stderr."""
        if not self._quiet:
            self._stderr.print(f"note: {one_line(text)}", soft_wrap=True, markup=False, highlight=False)

    def failure(self, text: str) -> None:
        """Print in one line on stderr what failed, if no tables are printed."""
        if self._json or self._quiet:
            self._stderr.print(one_line(text), soft_wrap=True, markup=False, highlight=False)

    @contextmanager
    def progress(self, description: str, images: int | None = None) -> Generator[Callable[..., None]]:
        """A spinner, or a bar if the number of images is known; shown only if stderr is a terminal.

        Yields a function with the arguments of rich's `Progress.update`: `description`, `total`, `completed`; and
        `unit`, the unit of the count, empty to leave out the speed.
        """
        columns = (
            SpinnerColumn("line"),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            _Done(),
            TimeRemainingColumn(),
        )
        hidden = self._quiet or not self._stderr.is_terminal
        with Progress(*columns, console=self._stderr, transient=True, disable=hidden) as progress:
            yield partial(progress.update, progress.add_task(description, total=images, unit="images"))


class _Done(ProgressColumn):
    """The amount done and the speed, such as images per second."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        unit = task.fields["unit"]
        speed = f", {task.speed:.0f} {unit}/s" if task.speed and unit else ""
        return Text(f"{task.completed:.0f}/{task.total:.0f}{speed}")


def _width(stream: TextIO) -> int | None:
    """The width for a stream; None lets rich use the width of the terminal, or COLUMNS."""
    return None if stream.isatty() or "COLUMNS" in os.environ else _FILE_WIDTH

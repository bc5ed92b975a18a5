"""Where a command's words go: results to stdout, everything else to stderr."""

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
    """The output of one command; inside its `with`, whatever else prints to stdout goes to stderr.

    Arguments:
        json: the result is one JSON object, alone on stdout.
        quiet: nothing but that object and errors.
    """

    def __init__(self, json: bool, quiet: bool) -> None:
        self._json, self._quiet = json, quiet
        self._stdout = sys.stdout
        self._stderr = Console(file=sys.stderr)
        self._outputs: dict[Path, tuple[int, int] | None] = {}

    def __enter__(self) -> Terminal:
        self._redirection = redirect_stdout(sys.stderr)  # a library or a user's factory may print
        self._redirection.__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._redirection.__exit__(kind, error, trace)
        written = [str(path) for path, before in self._outputs.items() if identity(path) not in (before, None)]
        if written and isinstance(error, KeyboardInterrupt):
            raise InterruptedAfterWritingError(f"interrupted; {', '.join(written)} was written") from error

    @contextmanager
    def replacing(self, path: Path, force: bool, directory: Directory | None = None) -> Generator[Path]:
        """`vitquant.files.replacing`, with which an interrupt says truly whether something was written."""
        with replacing(path, force, directory) as new:
            self._outputs[path] = identity(path)
            yield new

    def result(self, values: Mapping[str, Any], *tables: RenderableType) -> None:
        """Show the result: its values as JSON, or the tables; a string is one line, however wide that is."""
        if self._json:
            print(json.dumps(values, indent=2, allow_nan=False), file=self._stdout)
        elif not self._quiet:
            console = Console(file=self._stdout, width=_width(self._stdout), markup=False, highlight=False)
            console.width = max(console.width, LEAST)
            for table in tables:
                console.print(table, soft_wrap=isinstance(table, str))

    def note(self, text: str) -> None:
        """Say something that the user should know, on stderr."""
        if not self._quiet:
            self._stderr.print(f"note: {one_line(text)}", soft_wrap=True, markup=False, highlight=False)

    def failure(self, text: str) -> None:
        """Say in one line on stderr what failed, unless a table has said it."""
        if self._json or self._quiet:
            self._stderr.print(one_line(text), soft_wrap=True, markup=False, highlight=False)

    @contextmanager
    def progress(self, description: str, images: int | None = None) -> Generator[Callable[..., None]]:
        """A spinner, or a bar when the number of images is known; shown on a terminal only.

        Yields a function that takes what rich's `Progress.update` takes: `description`, `total`, `completed`; and
        `unit`, of what is counted, empty to leave out the speed.
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
    """How much is done, and how many images a second."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        unit = task.fields["unit"]
        speed = f", {task.speed:.0f} {unit}/s" if task.speed and unit else ""
        return Text(f"{task.completed:.0f}/{task.total:.0f}{speed}")


def _width(stream: TextIO) -> int | None:
    """None leaves it to rich: the width of the terminal, or COLUMNS."""
    return None if stream.isatty() or "COLUMNS" in os.environ else _FILE_WIDTH

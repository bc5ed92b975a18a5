"""stdout and stderr that may be closed, full, a pipe that nobody reads, or of another encoding: none of it is a fault.

It imports next to nothing: it is there before whatever takes long to import.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO


class Stream:
    """A text stream that goes on when what is behind it cannot take any more; what is printed then is lost.

    Arguments:
        stream: what it writes to.

    Attributes:
        failure: why what was printed is lost; None while nothing is.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write, or lose, a text; characters that the encoding lacks are written as escapes."""
        self._do(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Hand on what is buffered, or lose it."""
        self._do(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def lost(self) -> str:
        """Why a reader misses something; empty when nothing is lost, or when the reader of a pipe has enough."""
        if self.failure is None or self.failure.errno == errno.EPIPE:
            return ""
        return "it is closed" if self.failure.errno == errno.EBADF else str(self.failure.strerror).lower()

    def _do(self, action: Callable[..., object], *arguments: str) -> None:
        if self.failure is not None:
            return
        try:
            action(*arguments)
        except OSError as failure:
            self.failure = failure
            # What is still in the buffer would be written, and fail, once more at the end of the process.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class Streams:
    """`sys.stdout` and `sys.stderr` as `Stream`s, inside its `with`."""

    def __enter__(self) -> Streams:
        _open_closed()
        self._before = sys.stdout, sys.stderr
        self._errors = [_escape(stream) for stream in self._before]
        self.stdout, self.stderr = Stream(sys.stdout), Stream(sys.stderr)
        sys.stdout, sys.stderr = self.stdout, self.stderr  # type: ignore[assignment]
        return self

    def __exit__(self, *error: object) -> None:
        self.stdout.flush()
        self.stderr.flush()
        sys.stdout, sys.stderr = self._before
        for stream, errors in zip(self._before, self._errors, strict=True):
            if errors is not None:
                stream.reconfigure(errors=errors)  # type: ignore[attr-defined]


def _escape(stream: Any) -> str | None:
    """Let a stream escape what its encoding lacks; returns what it did before, None where that stays."""
    if not hasattr(stream, "reconfigure"):
        return None
    errors = stream.errors
    stream.reconfigure(errors="backslashreplace")
    return errors


def _open_closed() -> None:
    """Give closed standard streams a file: the next file that is opened would take their place.

    What is written to stdout fails then; what is written to stderr is lost.
    """
    ways = (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY))
    for number, (name, way) in enumerate(ways):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, way)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115

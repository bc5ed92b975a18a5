"""stdout and stderr that may be closed, full, a pipe without a reader, or of any encoding, without raising errors.

This module imports little, since it is needed before modules that take long to import.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO


class Stream:
    """A text stream that discards its text once writing to the underlying stream has failed.

    Arguments:
        stream: the underlying stream.

    Attributes:
        failure: the error of the first failed write; None if there was none.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text, or discard it after a failure; characters that the encoding lacks are escaped."""
        self._do(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush the buffer, or discard it after a failure."""
        self._do(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def lost(self) -> str:
        """The reason if output was lost; empty if not, or if the reader closed its end of a pipe."""
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
            # Otherwise the rest of the buffer would be written, and fail, again when the process ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class Streams:
    """Replaces `sys.stdout` and `sys.stderr` by `Stream`s inside its `with`."""

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
    """Let a stream escape characters that its encoding lacks; return its former error handling, None if unchanged."""
    if not hasattr(stream, "reconfigure"):
        return None
    errors = stream.errors
    stream.reconfigure(errors="backslashreplace")
    return errors


def _open_closed() -> None:
    """Open a file in place of each closed standard stream, whose descriptor the next opened file would get otherwise.

    Writing to such a stdout fails; what is written to such a stderr is discarded.
    """
    ways = (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY))
    for number, (name, way) in enumerate(ways):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, way)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115

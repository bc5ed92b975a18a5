"""Handling of Ctrl-C, and of the signals that a batch system or a closing terminal sends before it kills."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

INTERRUPTED = 130  # the exit code


class InterruptedAfterWritingError(Exception):
    """A command was interrupted after an output or a saved state had been written; the message names it."""


class Interrupts:
    """Turns signals into `KeyboardInterrupt` inside its `with`, except signals that the process ignores.

    Arguments:
        last: whether the process ends after the `with`: a later signal then ends it by the default action.

    Attributes:
        came: whether a signal came. Code that it interrupts may raise another error instead, so that any error after it
            counts as an interrupt.
    """

    def __init__(self, last: bool) -> None:
        self.came, self._last, self._process = False, last, os.getpid()
        self._number: int = signal.SIGINT
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._interrupt)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, *error: object) -> None:
        sys.unraisablehook = self._hook
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if self._last else before)  # type: ignore[arg-type]

    def _interrupt(self, number: int, *_: object) -> None:
        if os.getpid() != self._process:  # a worker that decodes images: its parent reports the interrupt
            os._exit(INTERRUPTED)
        self.came, self._number = True, number
        raise KeyboardInterrupt

    def _unraisable(self, unraisable: Any) -> None:
        """Send an interrupt again that was raised inside of a finalizer, whose exceptions Python only prints."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            threading.Timer(0.01, os.kill, (os.getpid(), self._number)).start()
        else:
            self._hook(unraisable)

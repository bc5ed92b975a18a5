"""The refusal of an output, before it is raised as an error of the caller's type."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from vitquant.errors import VitquantError


class RefusedError(Exception):
    """An output cannot be written; the message is the whole line."""


@contextmanager
def told_as(error: type[VitquantError], what: str) -> Generator[None]:
    """Raise refusals, and errors of the operating system, as an error of vitquant.

    Arguments:
        error: the type of the error to raise.
        what: what failed, to which the operating system's reason is appended.
    """
    try:
        yield
    except RefusedError as reason:
        raise error(str(reason)) from reason
    except (OSError, ValueError) as reason:  # ValueError: a path with a null character
        raise error(f"{what}: {getattr(reason, 'strerror', None) or reason}") from reason

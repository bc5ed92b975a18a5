"""Why an output cannot be written, until it is known whose error that is."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from vitquant.errors import VitquantError


class RefusedError(Exception):
    """An output cannot be written; the message is the whole line."""


@contextmanager
def told_as(error: type[VitquantError], what: str) -> Generator[None]:
    """What is refused, here or by the operating system, becomes an error of vitquant.

    Arguments:
        what: what failed, to be followed by the operating system's reason.
    """
    try:
        yield
    except RefusedError as reason:
        raise error(str(reason)) from reason
    except (OSError, ValueError) as reason:  # ValueError: a path with a null character
        raise error(f"{what}: {getattr(reason, 'strerror', None) or reason}") from reason

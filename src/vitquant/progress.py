"""Progress callbacks of long work."""

from __future__ import annotations

from collections.abc import Callable

# Called with the current activity, the amount done and the total.
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Ignore the progress."""

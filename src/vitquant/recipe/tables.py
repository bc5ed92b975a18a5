"""Error messages that say where in a recipe something is wrong."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from vitquant.errors import RecipeError


@contextmanager
def within(place: str) -> Generator[None]:
    """Put `place` before the message of a `RecipeError` raised inside."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{place}: {error}") from None

"""Read TOML or JSON tables strictly: every key is known, every value has its type, errors say where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, TypeVar

from vitquant.errors import RecipeError

T = TypeVar("T")
_TYPE_NAMES = {str: "a string", int: "an integer", bool: "true or false", dict: "a table", list: "a list"}


@contextmanager
def within(place: str) -> Iterator[None]:
    """Put `place` before the message of a `RecipeError` raised inside."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{place}: {error}") from None


def nearest(word: str, words: Iterable[str]) -> str:
    """The part of an error message that helps: the closest of `words`, or all of them."""
    words = list(words)
    close = get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(words) or 'none'}"


def check_keys(table: Mapping[str, object], valid: Iterable[str]) -> None:
    """Refuse a key that is not among `valid`.

    Raises:
        RecipeError: it names the key and the nearest valid one.
    """
    valid = list(valid)
    for key in table:
        if key not in valid:
            raise RecipeError(f"unknown key {key!r}; {nearest(key, valid)}")


def take(table: Mapping[str, Any], key: str, kind: type[T], default: T | None = None) -> T:
    """The value of `key`, which must be a `kind` (TOML's true is not an integer).

    Raises:
        RecipeError: another type, or no value where there is no default.
    """
    if key not in table:
        if default is None:
            raise RecipeError(f"{key!r} is missing")
        return default
    value = table[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RecipeError(f"{key} = {value!r} should be {_TYPE_NAMES[kind]}")
    return value


def take_strings(table: Mapping[str, Any], key: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The value of `key`, which may be one string or a list of them.

    Raises:
        RecipeError: anything else, or an empty list, which would match nothing.
    """
    if key not in table:
        return default
    value = table[key]
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
        raise RecipeError(f"{key} = {value!r} should be a string or a list of strings")
    if not strings:
        raise RecipeError(f"{key} = [] would match nothing; leave {key} out to match any")
    return tuple(strings)


def take_tables(table: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The tables written `[[key]]`, none when there are none.

    Raises:
        RecipeError: anything but a list of tables.
    """
    tables = take(table, key, list, [])
    if not all(isinstance(t, dict) for t in tables):
        raise RecipeError(f"write each {key} as a table under [[{key}]]")
    return tables

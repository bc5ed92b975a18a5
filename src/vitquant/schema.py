"""Schemas of files, declared as data, against which values of JSON and TOML are checked before they are used.

The module that reads a kind of file declares a schema and calls `check`; after that call every key is known, and every
value has its type and lies within its bounds. Errors name the key, its value and what it should be.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import UnionType
from typing import Any, NoReturn, Protocol, Union, get_args, get_origin

from vitquant.errors import VitquantError

_TURNING = r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # characters that change the direction of text
# Text of one line and of several, without control characters, with which a file could mislead a reader in a terminal.
LINE = rf"[^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff{_TURNING}]*"
LINES = rf"[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff{_TURNING}]*"
PATH = r"[^\x00]+"  # lone surrogates are allowed, since names may not be UTF-8
DEEPEST = 32  # levels of nested lists and tables
LONGEST_INTEGER = 20  # digits, enough for 64 bits


class Schema(Protocol):
    """The schema of a value."""

    def __str__(self) -> str:
        """A description of valid values, to follow "should be" in a message."""
        ...

    def check(self, value: Any, place: str) -> None:
        """Raise `Mismatch` unless the value fits; `place` is its key, for the message."""
        ...


class Mismatch(Exception):  # noqa: N818
    """A value does not fit a schema; the message names its key, the value and what it should be."""


def check(value: Any, schema: Schema, error: type[VitquantError], place: str = "") -> Any:
    """Check that a value fits a schema, and return it.

    Arguments:
        value: from JSON, TOML, or a caller; tuples count as lists.
        schema: its schema.
        error: the type of the error to raise if it does not fit.
        place: the key of the value, for the message.

    Raises:
        VitquantError: `error`; the message names the key, the value and what it should be.
    """
    try:
        schema.check(value, place)
    except Mismatch as mismatch:
        raise error(str(mismatch)) from None
    return value


def take(table: Mapping[str, Any], key: str, schema: Schema, error: type[VitquantError], place: str = "") -> Any:
    """The checked value of one key of a table, whose other keys are ignored; it raises the errors of `check`."""
    return check({key: table[key]} if key in table else {}, Table({key: schema}), error, place)[key]


def _refuse(value: Any, place: str, expected: object) -> NoReturn:
    raise Mismatch(f"{place + ' = ' if place else ''}{shown(value)} should be {expected}")


def shown(value: Any) -> str:
    """A value as text for an error message, shortened if it is long."""
    match value:
        case Mapping():
            return "a table"
        case list() | tuple() if len(value) > 8 or any(isinstance(each, list | tuple | Mapping) for each in value):
            return f"a list of {len(value)}"
        case int() if not -(10**LONGEST_INTEGER) < value < 10**LONGEST_INTEGER:
            return f"an integer of {value.bit_length()} bits"
        case _:
            text = repr(value[:80] if isinstance(value, str) else value)
            return text if len(text) <= 80 else f"{text[:80]}..."


def nearest(word: str, words: Iterable[str]) -> str:
    """A hint for an error message: the closest of `words`, or all of them."""
    words = list(words)
    close = get_close_matches(word[:100], words, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(words) or 'none'}"


@dataclass(frozen=True)
class Text:
    """A string.

    Arguments:
        longest: the largest number of characters.
        pattern: a regular expression that matches the whole string.
        among: the allowed strings; empty for any.
        least: the smallest number of characters.
    """

    longest: int = 1000
    pattern: str = LINE
    among: tuple[str, ...] = ()
    least: int = 0

    def __str__(self) -> str:
        if self.among:
            return f"one of {', '.join(self.among)}"
        plain = self.pattern in (LINE, LINES, PATH)
        return f"a string of {self.least} to {self.longest} characters{'' if plain else f' like {self.pattern}'}"

    def check(self, value: Any, place: str) -> None:
        if not isinstance(value, str):
            _refuse(value, place, "a string")
        if self.among and value not in self.among:
            raise Mismatch(f"{place + ': ' if place else ''}unknown {shown(value)}; {nearest(value, self.among)}")
        if not self.least <= len(value) <= self.longest or not re.fullmatch(self.pattern, value):
            _refuse(value, place, self)


@dataclass(frozen=True)
class Integer:
    """An integer from `low` to `high`; true and 1.0 are not integers."""

    low: int = -(2**63)
    high: int = 2**63 - 1

    def __str__(self) -> str:
        bounded = (self.low, self.high) != (Integer.low, Integer.high)
        return f"an integer from {self.low} to {self.high}" if bounded else "an integer of 64 bits"

    def check(self, value: Any, place: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            _refuse(value, place, self)


@dataclass(frozen=True)
class Number:
    """A finite number from `low` to `high`, integer or not."""

    low: float = -sys.float_info.max
    high: float = sys.float_info.max

    def __str__(self) -> str:
        bounded = (self.low, self.high) != (Number.low, Number.high)
        return f"a number from {self.low:g} to {self.high:g}" if bounded else "a finite number"

    def check(self, value: Any, place: str) -> None:
        if not isinstance(value, int | float) or isinstance(value, bool) or not self.low <= value <= self.high:
            _refuse(value, place, self)


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def __str__(self) -> str:
        return "true or false"

    def check(self, value: Any, place: str) -> None:
        if not isinstance(value, bool):
            _refuse(value, place, self)


@dataclass(frozen=True)
class Nothing:
    """JSON's null."""

    def __str__(self) -> str:
        return "null"

    def check(self, value: Any, place: str) -> None:
        if value is not None:
            _refuse(value, place, self)


@dataclass(frozen=True)
class Either:
    """Any of several schemas; if none fits, the error is that of the only list or table among them, or names all."""

    options: tuple[Schema, ...]

    def __str__(self) -> str:
        return " or ".join(map(str, self.options))

    def check(self, value: Any, place: str) -> None:
        deeper = []
        for option in self.options:
            try:
                return option.check(value, place)
            except Mismatch as mismatch:
                if isinstance(option, _CONTAINERS) and isinstance(value, list | tuple | Mapping):
                    deeper.append(mismatch)
        if len(deeper) == 1:
            raise deeper[0]
        _refuse(value, place, self)


def maybe(schema: Schema) -> Either:
    """A value of the schema, or null."""
    return Either((schema, Nothing()))


@dataclass(frozen=True)
class ListOf:
    """A list of `least` to `most` values with the same schema."""

    each: Schema
    least: int = 0
    most: int = 1_000_000

    def __str__(self) -> str:
        if self.least == self.most:
            return f"a list of {self.least}, each {self.each}"
        return f"a list of {self.least or 'no'} or more, each {self.each}"

    def check(self, value: Any, place: str) -> None:
        if not isinstance(value, list | tuple) or not self.least <= len(value) <= self.most:
            _refuse(value, place, self)
        for number, each in enumerate(value):
            self.each.check(each, f"{place}[{number}]")


@dataclass(frozen=True)
class Row:
    """A list of fixed length, with a schema for each value."""

    items: tuple[Schema, ...]

    def __str__(self) -> str:
        return f"a list of {len(self.items)}: {', then '.join(map(str, self.items))}"

    def check(self, value: Any, place: str) -> None:
        if not isinstance(value, list | tuple) or len(value) != len(self.items):
            _refuse(value, place, self)
        for number, (item, each) in enumerate(zip(self.items, value, strict=True)):
            item.check(each, f"{place}[{number}]")


@dataclass(frozen=True)
class TableOf:
    """A table with at least `least` keys, and with the same schema for all values."""

    each: Schema
    key: Text = field(default_factory=lambda: Text(least=1))
    least: int = 0

    def __str__(self) -> str:
        return "a table"

    def check(self, value: Any, place: str) -> None:
        if not isinstance(value, Mapping) or len(value) < self.least:
            _refuse(value, place, "a table" if not self.least else f"a table of {self.least} or more")
        for key, each in value.items():
            self.key.check(key, f"{place}: a key" if place else "a key")
            self.each.check(each, _below(place, key))


@dataclass(frozen=True)
class Table:
    """A table with fixed keys, and with a schema for the value of each; other keys are refused.

    Arguments:
        required, optional: the schemas by key.
    """

    required: Mapping[str, Schema]
    optional: Mapping[str, Schema] = field(default_factory=dict)

    def __str__(self) -> str:
        return "a table"

    def check(self, value: Any, place: str) -> None:
        if not isinstance(value, Mapping):
            _refuse(value, place, self)
        where, known = f"{place}: " if place else "", {**self.required, **self.optional}
        for key in value:
            if key not in known:
                raise Mismatch(f"{where}unknown key {shown(key)}; {nearest(str(key), known)}")
        if missing := [key for key in self.required if key not in value]:
            raise Mismatch(f"{where}{missing[0]!r} is missing")
        for key, each in value.items():
            known[key].check(each, _below(place, key))


@dataclass(frozen=True)
class Plain:
    """Any plain values: strings, finite numbers, true, false, null, and lists and tables of them."""

    def __str__(self) -> str:
        return "a string, a finite number, true, false, null, a list or a table"

    def check(self, value: Any, place: str) -> None:
        refuse_depth(value, place)
        self._check(value, place)

    def _check(self, value: Any, place: str) -> None:
        match value:
            case Mapping():
                for key, each in value.items():
                    Text().check(key, f"{place}: a key")
                    self._check(each, _below(place, key))
            case list() | tuple():
                for number, each in enumerate(value):
                    self._check(each, f"{place}[{number}]")
            case str():
                Text(100_000, PATH if value else LINE).check(value, place)
            case int() if not isinstance(value, bool):
                Integer().check(value, place)
            case float():
                Number().check(value, place)
            case bool() | None:
                pass
            case _:
                _refuse(value, place, self)


def of_type(hint: Any) -> Schema:
    """The schema for the declared type of a dataclass's field: plain types, optional types, unions and sequences."""
    match hint:
        case _ if hint in _OF_TYPE:
            return _OF_TYPE[hint]
        case _ if type(None) in get_args(hint):
            return maybe(of_type(next(each for each in get_args(hint) if each is not type(None))))
        case _ if get_origin(hint) in (tuple, list):
            return ListOf(of_type(get_args(hint)[0]))
        case _ if get_origin(hint) in (Union, UnionType):
            return Either(tuple(map(of_type, get_args(hint))))
        case _:
            return TableOf(Plain())


_OF_TYPE: dict[Any, Schema] = {str: Text(), int: Integer(), float: Number(), bool: Flag()}
_CONTAINERS = ListOf | Row | TableOf | Table | Plain


def _below(place: str, key: str) -> str:
    if not key.isidentifier():
        return f"{place}[{shown(key)}]"
    return f"{place}.{key}" if place else key


def refuse_depth(value: Any, place: str = "") -> None:
    """Raise `Mismatch` for a value that is nested too deep, without recursion."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            each
            for container in level
            if isinstance(container, Mapping | list | tuple)
            for each in (container.values() if isinstance(container, Mapping) else container)
        ]
        if not level:
            return
    raise Mismatch(f"{place + ': ' if place else ''}lists and tables are nested more than {DEEPEST} deep")

"""Reading JSON and TOML files of bounded size, and parsing them strictly into plain values.

The values are checked by schemas, see `schema`.
"""

from __future__ import annotations

import json
import re
import stat
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vitquant.errors import VitquantError
from vitquant.schema import DEEPEST, LONGEST_INTEGER, Mismatch, refuse_depth, shown

_KEY_PARTS = re.compile(r"""(?:(?<![\w-])[\w-]++|"[^"\n]*+"|'[^'\n]*+')(?:[ \t]*+\.[ \t]*+[\w"'-]++){32}""")


def read_file(path: Path, most: int, error: type[VitquantError]) -> bytes:
    """The content of a file.

    Arguments:
        path: of a regular file; pipes and devices, which may never end, are refused.
        most: the largest size in bytes of such a file.
        error: the type of the error to raise.

    Raises:
        VitquantError: `error`, without the path: it is not a regular file, cannot be read, or is too large.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise error("cannot be read: it is no file")
        if about.st_size > most:
            raise error(f"cannot be read: it has {about.st_size} bytes, and no such file has more than {most}")
        return path.read_bytes()
    except (OSError, ValueError) as reason:  # a path that holds a null character
        raise error(f"cannot be read: {getattr(reason, 'strerror', None) or reason}") from None


def parse_json(content: bytes | str, error: type[VitquantError], edited: bool = False) -> Any:
    """The values of a JSON text; duplicate keys, NaN, infinity and integers of more than 20 digits are refused.

    Arguments:
        content: the text, or its bytes in UTF-8.
        error: the type of the error to raise.
        edited: whether users may have edited the file, whose editor may have added a byte order mark or changed the
            encoding.

    Raises:
        VitquantError: `error`; the message has the line and column at which the text is not valid JSON.
    """
    return _parsed("JSON", content, error, lambda text: json.loads(text, **_STRICT), edited)


def parse_toml(content: bytes | str, error: type[VitquantError]) -> dict[str, Any]:
    """The table of a TOML text, with or without a byte order mark.

    Raises:
        VitquantError: `error`; the message has the line and column at which the text is not valid TOML.
    """

    def parse(text: str) -> dict[str, Any]:
        if _KEY_PARTS.search(text):  # the time of tomllib is quadratic in them
            raise ValueError(f"a key has more than {DEEPEST} parts")
        return tomllib.loads(text)

    return _parsed("TOML", content, error, parse, edited=True)


def parse_value(text: str, error: type[VitquantError]) -> Any:
    """A TOML value, or the text itself where it is a bare word.

    Raises:
        VitquantError: `error`: it is empty, or begins like a value and is none.
    """
    try:
        parsed = parse_toml(f"value = {text}", error)
    except VitquantError:
        parsed = {}
    if set(parsed) == {"value"}:
        return parsed["value"]
    word = text.strip()
    if not word or word[0] in "[{\"'" or "\n" in word:
        raise error(f"{word!r} is not a TOML value")
    return word


def _parsed(
    form: str, content: bytes | str, error: type[VitquantError], parse: Callable[[str], Any], edited: bool
) -> Any:
    try:
        text = content if isinstance(content, str) else _decoded(content, edited)
        value = parse(text.removeprefix("\ufeff") if edited else text)
        refuse_depth(value)
    except RecursionError:
        raise error(f"not valid {form}: lists and tables are nested more than {DEEPEST} deep") from None
    except (ValueError, Mismatch) as reason:  # not UTF-8, not JSON, or more digits than Python converts
        raise error(f"not valid {form}: {str(reason)[:300]}") from None
    return value


def _decoded(content: bytes, edited: bool) -> str:
    if not edited:
        return content.decode()
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without a byte order mark is valid UTF-8 with nulls
        raise ValueError("it is not text in UTF-8; save it as UTF-8")
    return text


def _integer(text: str) -> int:
    if len(text) > LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if abs(number) > sys.float_info.max:
        raise ValueError(f"{text[:40]} is larger than any number")
    return number


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _table(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"key {shown(key)} comes twice")
        table[key] = value
    return table


_STRICT: dict[str, Any] = {
    "parse_int": _integer,
    "parse_float": _finite,
    "parse_constant": _no_number,
    "object_pairs_hook": _table,
}

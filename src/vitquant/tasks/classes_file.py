"""Files that map folders to classes, in their common formats."""

from __future__ import annotations

import ast
import csv
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vitquant.errors import DataError
from vitquant.schema import shown
from vitquant.tasks.classes import SYNSET, ClassNames

_MOST_BYTES = 2**22  # 21,843 classes of ImageNet with their names take 1 MB
_MOST_LITERAL_BYTES = 2**20
_DELIMITERS = (",", ";", "\t")
_PAIRS = "write lines of folder,class_index, with whole numbers from 0"
_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?")
Entry = tuple[str, Any]  # a name, and its class index before it is checked


def read_classes(path: str | Path, count: int) -> ClassNames:
    """Read a file that maps folders to classes.

    Formats: lines `folder,class_index` (or with `;` or tabs; a first line of headers is skipped); one name per line, as
    many as the model has classes, the first being class 0 (synsets, names, or `n01440764 tench, Tinca tinca`); JSON or
    a Python literal: a list of names, `{"folder": index}`, `{"0": "name"}`, `{"0": ["n01440764", "tench"]}`, or an
    object with `id2label` or `label_names`, as in the config.json of transformers and timm.

    Arguments:
        count: the number of classes of the model.

    Raises:
        DataError: the file cannot be read, has none of these formats, names a folder twice, has an index that is not a
            class, or does not list as many names as the model has classes.
    """
    text = _text(Path(path))
    try:
        entries, listed = _entries(text)
        if listed and len(entries) != count:
            raise DataError(
                f"{len(entries)} names, a class each, but the model has {count} classes; "
                "to name some of them write lines of folder,class_index"
            )
        names: dict[int, tuple[str, ...]] = {}
        for name, index in entries:
            names[number] = (*names.get(number := _index(index, count), ()), *_names(name))
        _refuse_twice(name for name, _ in entries if not listed)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return ClassNames(count, names, str(path), by_file=True)


def _text(path: Path) -> str:
    try:
        if not os.path.isfile(path):
            raise DataError(f"{path}: no such file of classes")
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise DataError(f"{path}: {size:,} bytes are too many for a file of classes ({_MOST_BYTES:,} at most)")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise DataError(f"{path}: no classes")
    return text


def _entries(text: str) -> tuple[list[Entry], bool]:
    """Names with their class indices, and whether an index is the position in a list."""
    if text.lstrip()[0] in "[{(":
        return _from_value(_value(text))
    lines = text.rstrip().splitlines()
    if pairs := _pairs(lines):
        return pairs, False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise DataError(f"line {number} is empty, and the number of a line is a class index")
        if _holds_a_number(line):
            raise DataError(f"line {number}, {shown(line)}, is neither a name nor folder,class_index; {_PAIRS}")
    _refuse_other_numbers(lines)
    return [(line.strip(), index) for index, line in enumerate(lines)], True


def _pairs(lines: Sequence[str]) -> list[Entry]:
    """The entries of lines `name,index` or `index,name`; empty if the lines have another format."""
    for delimiter in _DELIMITERS:
        try:
            cells = list(csv.reader(lines, delimiter=delimiter, strict=True))
        except csv.Error as error:
            raise DataError(f"cannot be read as lines of folder,class_index: {error}") from error
        rows = [[cell.strip() for cell in row] for row in cells if row]
        while rows and all(len(row) > 1 and not row[-1] for row in rows):  # as spreadsheets write empty columns
            rows = [row[:-1] for row in rows]
        if any(len(row) != 2 for row in rows):
            continue
        for column in (1, 0):
            body = rows if _NUMBER.fullmatch(rows[0][column]) else rows[1:]  # without the headers
            if body and all(_is_number(row[column]) for row in body):
                return [(row[1 - column], row[column]) for row in body]
    return []


def _holds_a_number(line: str) -> bool:
    """Whether a line that is not a pair of name and index still has a number as a cell, and so is not just a name."""
    cells = [cell.strip() for cell in re.split("[,;\t]", line)]
    synset = SYNSET.match(line.lstrip())
    behind = line.lstrip()[synset.end() :].split()[:1] if synset else []
    return any(_NUMBER.fullmatch(text) for text in [*(cells if len(cells) > 1 else []), *behind])


def _refuse_other_numbers(lines: Sequence[str]) -> None:
    """Refuse names that all have numbers, if these are not 0, 1, .. in the order of the lines."""
    for place in (0, -1):
        words = [line.split()[place] for line in lines if len(line.split()) > 1]
        numbers = [int(word) for word in words if _is_number(word) and len(word) < 10 and int(word) <= len(lines)]
        if len({*numbers}) == len(lines) > 1 and numbers != [*range(len(lines))]:
            raise DataError(f"its names have the numbers {numbers[0]}, {numbers[1]}, ..., not those of lines; {_PAIRS}")


def _value(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise DataError("nested too deep") from None
    except ValueError as error:
        first = error
    try:
        if len(text) <= _MOST_LITERAL_BYTES:
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    raise DataError(f"neither JSON nor a list of names: {first}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_twice(key for key, _ in pairs)
    return dict(pairs)


def _from_value(value: Any) -> tuple[list[Entry], bool]:
    if isinstance(value, dict):
        value = next((value[key] for key in ("id2label", "label_names") if value.get(key)), value)
    if isinstance(value, list | tuple):
        return list(zip(value, range(len(value)), strict=True)), True
    if not isinstance(value, dict) or not value:
        raise DataError("neither a list of names nor an object of folders and class indices")
    if all(isinstance(index, int) or _is_number(index) for index in value.values()):
        return list(value.items()), False  # takes precedence: {"7": 0} means that folder 7 is class 0
    if not all(isinstance(key, int) or _is_number(key) for key in value):
        raise DataError("an object of classes has folders and their indices, or indices and their names")
    names = [(name, index) for index, said in value.items() for name in (said if _is_list(said) else [said])]
    return names, False


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _is_number(value: object) -> bool:
    return isinstance(value, str) and value.isascii() and value.isdigit()


def _index(value: Any, count: int) -> int:
    number = int(value) if isinstance(value, str) and _is_number(value) and len(value) <= 9 else value
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < count:
        raise DataError(f"class index {shown(value)}: the model's are 0 to {count - 1}")
    return number


def _names(name: Any) -> tuple[str, ...]:
    """The names of a class, where a line may hold both its synset and its names."""
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"a name of a class must be text, not {shown(name)}")
    synset = SYNSET.match(name)
    rest = name[synset.end() :] if synset else ""
    return (name, synset.group(), rest.strip()) if synset and rest[:1].isspace() else (name,)


def _refuse_twice(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"{name[:60]!r} is there twice")
        seen.add(name)

"""`labels.csv`, which lists image files and the class of each."""

from __future__ import annotations

import csv
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from vitquant.errors import DataError

_COLUMNS = ("file", "class_index")
_MOST_BYTES = 2**28  # the 14 million images of ImageNet-21k would take about as much
_MOST_DIGITS = 9


def read_labels(path: Path) -> list[tuple[Path, int]]:
    """The images and class indices of a `labels.csv`, in its order.

    Paths are relative to its directory; files in other directories (absolute, or with `..`) are allowed, since they are
    only decoded as images.

    Raises:
        DataError: it is not a regular UTF-8 file with the columns `file` and `class_index` (others are ignored), a row
            has another format, or a file has two rows; the message names the line.
    """
    try:
        if not os.path.isfile(path):
            raise DataError(f"{path}: not a regular file")
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise DataError(f"{path}: {size:,} bytes are too many ({_MOST_BYTES:,} at most)")
        with path.open(newline="", encoding="utf-8-sig") as file:
            pairs = list(_rows(path, csv.reader(file, strict=True)))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as CSV UTF-8"
        ) from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not pairs:
        raise DataError(f"{path}: no rows")
    return pairs


def _rows(path: Path, rows: Iterator[list[str]]) -> Iterator[tuple[Path, int]]:
    header = [name.strip() for name in next(rows, [])]
    if missing := [name for name in sorted(_COLUMNS) if name not in header]:
        other = next((mark for mark in (";", "\t", "|") if mark in "".join(header)), None)
        hint = f"; its columns are separated by {other!r}, save it with commas" if other else ""
        raise DataError(f"{path}: no column {' or '.join(missing)}{hint}")
    if twice := [name for name in _COLUMNS if header.count(name) > 1]:
        raise DataError(f"{path}: two columns {twice[0]}")
    columns = [header.index(name) for name in _COLUMNS]
    lines: dict[str, int] = {}
    for row in rows:
        number = rows.line_num  # type: ignore[attr-defined]
        if not row:
            continue
        if len(row) > len(header):
            raise DataError(f"{path}, line {number}: {len(row)} columns, not {len(header)}; quote text with commas")
        file, label = (row[column].strip() if column < len(row) else "" for column in columns)
        if not file or not label.isascii() or not label.isdigit() or len(label) > _MOST_DIGITS:
            said = f"{label[:20]!r}{'...' if len(label) > 20 else ''}"
            raise DataError(f"{path}, line {number}: needs a file and a class_index of 0 or more, not {said}")
        if any(unicodedata.category(letter) == "Cc" for letter in file):
            raise DataError(f"{path}, line {number}: a control character in the name of the file")
        first = lines.setdefault(os.path.normpath(path.parent.absolute() / file), number)
        if first != number:
            raise DataError(f"{path}, line {number}: {file} is in line {first} as well")
        yield path.parent / file, int(label)

"""The metadata of exported files: strings by name, which ONNX and OpenVINO store beside a graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vitquant.errors import ExportError
from vitquant.parsing import parse_json
from vitquant.schema import Integer, ListOf, Number, Schema, Table, TableOf, Text, check

_PREFIX = "vitquant."
_SCALE = Number(2.0**-140, 2.0**100)
_CODE = Integer(-(2**31), 2**31)
_OPTION = Text(among=("0", "1"))

# The facts that the runtimes here read; others are for people and other programs.
_SCHEMAS: Mapping[str, Schema] = {
    "input": Table({"scale": _SCALE, "zero_point": _CODE, "low": _CODE, "high": _CODE}),
    "outputs": TableOf(Table({"scale": ListOf(_SCALE, 1, 2**20), "zero_point": _CODE}), Text(1000)),
    # Only these two, which choose among kernels: other options of ONNX Runtime read and write files.
    "session_options": Table({}, {"session.x64quantprecision": _OPTION, "session.qdqisint8allowed": _OPTION}),
}


def name_of(fact: str) -> str:
    """The name of a fact in a file's metadata."""
    return f"{_PREFIX}{fact}"


def to_metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """The metadata for facts, under vitquant's own names: strings as they are, other plain values as JSON."""
    return {
        name_of(name): fact if isinstance(fact, str) else json.dumps(fact, sort_keys=True)
        for name, fact in facts.items()
    }


def fact_of(metadata: Mapping[str, str], name: str) -> str | None:
    """The text of one fact; None where the metadata lacks it."""
    return metadata.get(name_of(name))


def values_of(metadata: Mapping[str, str], name: str) -> Any:
    """A fact that was stored as JSON, checked by its schema; None where the metadata lacks it.

    Raises:
        ExportError: the text is not valid JSON, or does not fit the schema.
    """
    text = fact_of(metadata, name)
    if text is None:
        return None
    try:
        return check(parse_json(text, ExportError), _SCHEMAS[name], ExportError)
    except ExportError as error:
        raise ExportError(f"its metadata {name_of(name)}: {error}") from None

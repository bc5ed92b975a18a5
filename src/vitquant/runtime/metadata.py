"""What exported files say of themselves, as the strings by name that ONNX and OpenVINO keep beside a graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_PREFIX = "vitquant."


def to_metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts under vitquant's own names: strings as they are, other plain values as JSON."""
    return {
        f"{_PREFIX}{name}": fact if isinstance(fact, str) else json.dumps(fact, sort_keys=True)
        for name, fact in facts.items()
    }


def fact_of(metadata: Mapping[str, str], name: str) -> str | None:
    """One of them; None where a file does not say it."""
    return metadata.get(f"{_PREFIX}{name}")

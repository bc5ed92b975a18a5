"""The source of a model: its name and everything else that is needed to build it again."""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vitquant.errors import ModelError
from vitquant.schema import PATH, Integer, Plain, Table, TableOf, Text, check, maybe

LIBRARIES = ("timm", "transformers", "torchvision", "python")
_SCHEMA = Table(
    {"name": Text(4096, PATH, least=1)},
    {
        "arguments": TableOf(Plain(), Text(100, r"[A-Za-z_]\w*")),
        "weights": Text(4096, PATH, least=1),
        "seed": Integer(),
        "weights_sha256": maybe(Text(64, "[0-9a-f]{64}")),
        "weights_key": maybe(Text(200)),
    },
)


@dataclass(frozen=True)
class ModelSource:
    """The source of a model, from which it can be built again.

    Arguments:
        name: `timm:NAME`, `torchvision:NAME`, `python:package.module:factory`, or `transformers:` and
            a hub name, a directory, a config.json or a model type (`vit`).
        arguments: passed to the library; JSON values (tuples become lists).
        weights: `pretrained`, `random`, or the path of a weights file: of safetensors or `torch.save`, an index of
            shards, or a directory as transformers saves it.
        seed: of random weights.
        weights_sha256: of the weights file; `create` refuses a file with another digest.
        weights_key: the name of one of several state dicts in the file, such as `model` or `state_dict_ema`.

    Raises:
        ModelError: the library is unknown, or a saved model cannot store a field.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weights: str = "pretrained"
    seed: int = 0
    weights_sha256: str | None = None
    weights_key: str | None = None

    def __post_init__(self) -> None:
        if self.library not in LIBRARIES or not self.model:
            near = difflib.get_close_matches(self.library, LIBRARIES, n=1)
            hint = f" (did you mean {near[0]}:?)" if near and near[0] != self.library else ""
            raise ModelError(f"model {self.name!r}: write LIBRARY:NAME, LIBRARY one of {', '.join(LIBRARIES)}{hint}")
        try:
            object.__setattr__(self, "arguments", json.loads(json.dumps(dict(self.arguments), allow_nan=False)))
        except (TypeError, ValueError, RecursionError) as error:
            raise ModelError(f"{self.name}: model arguments must be plain JSON values: {error}") from error
        check(self.to_dict(), _SCHEMA, ModelError, "model source")  # so that it can be saved and read

    @property
    def library(self) -> str:
        """`timm`, `transformers`, `torchvision` or `python`."""
        return self.name.partition(":")[0]

    @property
    def model(self) -> str:
        """The name inside the library."""
        return self.name.partition(":")[2]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSource:
        """Read what `to_dict` returned.

        Raises:
            ModelError: a key is missing or unknown, or a value has the wrong type.
        """
        return cls(**check(values, _SCHEMA, ModelError, "model source"))


def parse_model_arguments(assignments: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` texts; a value is a Python literal, or else a string.

    Raises:
        ModelError: there is no `=`, a key is there twice, or a value is `true`, `false`, `none` or `null`, which as a
            non-empty string would be true.
    """
    arguments: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key.isidentifier():
            raise ModelError(f"model argument {text!r}: write key=value")
        if key in arguments:
            raise ModelError(f"model argument {key!r} is given twice")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            if value.lower() in ("true", "false", "none", "null"):
                raise ModelError(f"model argument {text!r}: write True, False or None") from None
            arguments[key] = value
    return arguments

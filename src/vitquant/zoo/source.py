"""The name of a model and all that is needed to make it again."""

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
    """Where a model comes from; all that is needed to make it again.

    Arguments:
        name: `timm:NAME`, `torchvision:NAME`, `python:package.module:factory`, or `transformers:` and
            a hub name, a directory, a config.json or a model type (`vit`).
        arguments: passed to the library; anything JSON holds (tuples become lists).
        weights: `pretrained`, `random`, or the path of a file of weights: safetensors or `torch.save`'s, an index of
            shards, or a directory as transformers saves it.
        seed: of random weights.
        weights_sha256: of the weights file; `create` refuses a file with another one.
        weights_key: which of several state dicts in the file, such as `model` or `state_dict_ema`.

    Raises:
        ModelError: an unknown library, or a field that a saved model cannot hold.
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
        check(self.to_dict(), _SCHEMA, ModelError, "model source")  # so that what is saved is read again

    @property
    def library(self) -> str:
        """`timm`, `transformers`, `torchvision` or `python`."""
        return self.name.partition(":")[0]

    @property
    def model(self) -> str:
        """The name inside the library."""
        return self.name.partition(":")[2]

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSource:
        """Read what `to_dict` wrote.

        Raises:
            ModelError: a missing or unknown key, or a value of the wrong type.
        """
        return cls(**check(values, _SCHEMA, ModelError, "model source"))


def parse_model_arguments(assignments: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` texts; a value is a Python literal, or else a string.

    Raises:
        ModelError: no `=`, a key twice, or `true`, `false`, `none`, `null`, which as strings would all be true.
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

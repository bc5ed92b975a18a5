"""The schema of a saved model's `config.json`; `stored_tensors` checks the tensors that it describes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from vitquant.errors import CheckpointError
from vitquant.integer_modules.arithmetic import CHOICES
from vitquant.model.checkpoint import CONFIG, DIGEST, FILES, FORMAT
from vitquant.recipe.rule import GRANULARITIES, SCHEMES
from vitquant.schema import PATH, Flag, Integer, ListOf, Plain, Schema, Table, TableOf, Text, check, maybe
from vitquant.spec import MAX_BITS, MIN_BITS

_MOST_PIXELS = 2**26  # channels times height times width; loading makes two random images

_SPEC = Table(
    {
        "scheme": Text(among=tuple(SCHEMES)),
        "bits": Integer(MIN_BITS, MAX_BITS),
        "signed": Flag(),
        "symmetric": Flag(),
        "per": Text(among=GRANULARITIES),
    },
    {
        "axis": Integer(-16, 16),
        "clamp_before_round": Flag(),
        "factors": Integer(1, 8),
        "shift": Integer(1, 8),
        "separate_zero": Flag(),
    },
)
_QUANTIZATION = Table(
    {
        "quant_method": Text(among=("vitquant",)),
        "bits": Text(100),
        "recipe": TableOf(Plain()),  # like source and preprocessing, checked by a schema of its own
        "operands": TableOf(Table({"rule": Text(), "spec": maybe(_SPEC)}), least=1),
        "packed": TableOf(Table({"operand": Text(), "shape": ListOf(Integer(1, 2**31), 1, 8)})),
    },
    {"arithmetic": maybe(Table({}, {key: Text(among=words) for key, words in CHOICES.items()}))},
)
_CALIBRATION = Table(
    {"images": Integer(1), "sha256": DIGEST},
    {
        "directory": Text(10_000, PATH),
        "synthetic": TableOf(Plain()),  # how the images were made, where they were made for the model
        "seed": Integer(),
        "batch": Integer(1),
        "input_shape": ListOf(Integer(1, 2**16), 3, 3),  # where the model was captured again for another size
    },
)
RECORD = Table({"method": Text(), "summary": TableOf(Plain()), "decisions": TableOf(TableOf(Plain()))})
_PROVENANCE: dict[str, Schema] = {
    "source": maybe(TableOf(Plain())),
    "preprocessing": maybe(TableOf(Plain())),
    "calibration": maybe(_CALIBRATION),
    "task": maybe(Text(100)),  # one of `tasks.task.TASKS`
}
_SCHEMA = Table(
    {
        "versions": TableOf(Text(100)),
        "input_shape": ListOf(Integer(1, 2**16), 3, 3),
        "graph_fingerprint": DIGEST,
        "quantization_config": _QUANTIZATION,
        "records": ListOf(RECORD),
    },
    {"format": Integer(FORMAT, FORMAT), "files": FILES, **_PROVENANCE},  # written and read by `checkpoint`
)
PROVENANCE = tuple(_PROVENANCE)


def check_config(config: dict[str, Any], directory: str | Path) -> dict[str, Any]:
    """Check that a config is that of a saved model, and return it.

    Arguments:
        config: from `read_config`, or about to be written.
        directory: for the message.

    Raises:
        CheckpointError: a key is unknown or missing, or a value does not fit the schema.
    """
    where = Path(directory) / CONFIG
    try:
        check(config, _SCHEMA, CheckpointError)
        if math.prod(config["input_shape"]) > _MOST_PIXELS:
            raise CheckpointError(
                f"input_shape = {config['input_shape']}: no image has more than {_MOST_PIXELS} pixels"
            )
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return config

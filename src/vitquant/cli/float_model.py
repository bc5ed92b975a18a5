"""The float model that a saved model is compared with, where it is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitquant.cli.terminal import Terminal
from vitquant.errors import ModelError, VitquantError

if TYPE_CHECKING:
    from torch import nn


def float_model(out: Path, weights: str | None, repeated: dict[str, Any], terminal: Terminal) -> nn.Module | None:
    """The float model; None, with a note, when its weights are not where they were and no others were given."""
    from vitquant import loading

    try:
        return loading.float_model(out, weights, **repeated)
    except VitquantError as error:
        if weights is not None:
            raise
        where = "; --weights PATH says where they are" if isinstance(error, ModelError) else ""
        terminal.note(f"not compared with the float model: {error}{where}")
        return None

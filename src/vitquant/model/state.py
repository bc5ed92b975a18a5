"""All that methods change in a quantized model, as tensors by name."""

from __future__ import annotations

from torch import Tensor

from vitquant.graph.segments import QUANTIZERS
from vitquant.model.quantized import QuantizedModel
from vitquant.model.stored_tensors import load_tensors, stored_quantizer


def state_of(model: QuantizedModel) -> dict[str, Tensor]:
    """Parameters and the numbers of the quantizers there are."""
    return dict(model.graph_module.state_dict())


def put_state(model: QuantizedModel, tensors: dict[str, Tensor], where: str) -> None:
    """Give a model of the same float model and recipe what `state_of` gave.

    Arguments:
        model: its quantizers are replaced.
        tensors: on any device.
        where: they come from, for messages.

    Raises:
        CheckpointError: they are not of this model.
    """
    parameter = next(model.parameters())
    found = {
        value.name: stored_quantizer(tensors, f"{QUANTIZERS}.{value.name}", value, spec, where).to(parameter.device)
        for value in model.values
        if (spec := model.assignments[value.name].spec) is not None and f"{QUANTIZERS}.{value.name}.scale" in tensors
    }
    model.insert(found)
    load_tensors(model.graph_module, tensors, {}, where)

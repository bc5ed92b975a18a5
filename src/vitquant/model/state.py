"""The state of a quantized model that methods change, as tensors by name."""

from __future__ import annotations

from torch import Tensor

from vitquant.graph.segments import QUANTIZERS
from vitquant.model.quantized import QuantizedModel
from vitquant.model.stored_tensors import load_tensors, stored_quantizer


def state_of(model: QuantizedModel) -> dict[str, Tensor]:
    """The parameters and buffers of a model, and scales, zero points and factors of its quantizers."""
    return dict(model.graph_module.state_dict())


def put_state(model: QuantizedModel, tensors: dict[str, Tensor], where: str) -> None:
    """Restore what `state_of` returned into a model of the same float model and recipe.

    Arguments:
        model: its quantizers are replaced.
        tensors: on any device.
        where: the file that they come from, for messages.

    Raises:
        CheckpointError: the tensors are not of such a model.
    """
    parameter = next(model.parameters())
    found = {
        value.name: stored_quantizer(tensors, f"{QUANTIZERS}.{value.name}", value, spec, where).to(parameter.device)
        for value in model.values
        if (spec := model.assignments[value.name].spec) is not None and f"{QUANTIZERS}.{value.name}.scale" in tensors
    }
    model.insert(found)
    load_tensors(model.graph_module, tensors, {}, where)

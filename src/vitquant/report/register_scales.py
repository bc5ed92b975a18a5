"""The scales of the codes in a program's registers, from the model that was lowered."""

from __future__ import annotations

from vitquant.model import QuantizedModel
from vitquant.program.instructions import IntegerProgram


def register_scales(model: QuantizedModel, program: IntegerProgram) -> dict[str, tuple[float, float]]:
    """For registers and constants of codes, by name, the smallest and the largest scale.

    Arguments:
        model: calibrated.
        program: what `lower` returned for the model.
    """
    steps = {register: model.quantizers[value].step for value, register in program.codes.items()}
    return {register: (step.min().item(), step.max().item()) for register, step in steps.items()}

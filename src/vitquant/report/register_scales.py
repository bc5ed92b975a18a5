"""What the codes in a program's registers are worth, from the model that it was lowered from."""

from __future__ import annotations

from vitquant.model import QuantizedModel
from vitquant.program.instructions import IntegerProgram


def register_scales(model: QuantizedModel, program: IntegerProgram) -> dict[str, tuple[float, float]]:
    """For registers and constants by name, the smallest and the largest scale of the codes that they have.

    Arguments:
        model: calibrated.
        program: what `lower` made of it.
    """
    steps = {register: model.quantizers[value].step for value, register in program.codes.items()}
    return {register: (step.min().item(), step.max().item()) for register, step in steps.items()}

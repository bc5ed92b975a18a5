"""The instructions that rearrange a tensor and compute nothing."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from vitquant.program.instructions import Instruction, Pad, Permute, Reshape, Roll, Slice


def move(instruction: Instruction, x: Tensor) -> Tensor:
    """The tensor rearranged, of any dtype.

    Raises:
        TypeError: the instruction is no move.
    """
    match instruction:
        case Reshape(shape=shape):
            return x.reshape(shape)
        case Permute(axes=axes):
            return x.permute(axes)
        case Slice(axis=axis, start=start, stop=stop, step=step):
            return x[(slice(None),) * axis + (slice(start, stop, step),)]
        case Roll(shifts=shifts, axes=axes):
            return x.roll(shifts, axes)
        case Pad(amounts=amounts, value=value):
            return functional.pad(x, amounts, value=value)
        case _:
            raise TypeError(f"{type(instruction).__name__} is no move")

"""Execution of the instructions that only rearrange a tensor."""

from __future__ import annotations

from typing import assert_never

from torch import Tensor
from torch.nn import functional

from vitquant.program.instructions import Move, Pad, Permute, Reshape, Roll, Slice


def move(instruction: Move, x: Tensor) -> Tensor:
    """The tensor rearranged, in its own dtype, which must hold the padding value."""
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
            assert_never(instruction)

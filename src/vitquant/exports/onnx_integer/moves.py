"""Moves and concatenation of integer programs as ONNX nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

import numpy as np

from vitquant.errors import ExportError
from vitquant.exports.onnx_integer.builder import Value
from vitquant.program import instructions as p

_END = 2**31 - 1  # the end of an axis of any size


def move(instruction: p.Move, x: Value, shape: Sequence[int]) -> Value:
    """The tensor rearranged.

    Arguments:
        x: the input, in a dtype that holds the padding value.
        shape: of the input, -1 for the size that grows with the batch.

    Raises:
        ExportError: a roll along the batch.
    """
    match instruction:
        case p.Reshape(shape=sizes):
            return x.graph.node("Reshape", x, x.graph.shape(sizes))
        case p.Permute(axes=axes):
            return x.graph.node("Transpose", x, perm=axes)
        case p.Slice(axis=axis, start=start, stop=stop, step=step):
            return _slice(x, (axis,), (start,), (stop,), step)
        case p.Roll(shifts=shifts, axes=axes):
            for shift, axis in zip(shifts, axes, strict=True):
                x = _roll(x, shift, axis, shape[axis])
            return x
        case p.Pad(amounts=amounts, value=value):
            return _pad(x, amounts, value, len(shape))
        case _:
            assert_never(instruction)


def concatenate(parts: Sequence[Value], shapes: Sequence[Sequence[int | str]], axis: int) -> Value:
    """Tensors concatenated along one axis; a part with a batch of one is repeated for every image.

    Arguments:
        shapes: of the parts, with a string for the size that grows with the batch.
    """
    batches = [shape[0] for shape in shapes]
    most = next((size for size in batches if isinstance(size, str)), None) or max(batches)
    largest = parts[batches.index(most)]
    joined = [
        part if size == most else _repeated(part, largest, most, len(shape))
        for part, size, shape in zip(parts, batches, shapes, strict=True)
    ]
    return parts[0].graph.node("Concat", *joined, axis=axis)


def _repeated(part: Value, like: Value, most: int | str, rank: int) -> Value:
    """A tensor expanded to the size of another along the first axis."""
    graph = part.graph
    if isinstance(most, int):
        return graph.node("Expand", part, graph.shape([most, *[1] * (rank - 1)]))
    batch = graph.node("Shape", like, dtype=np.int64, start=0, end=1)
    return graph.node("Expand", part, graph.node("Concat", batch, graph.shape([1] * (rank - 1)), axis=0))


def _slice(x: Value, axes: Sequence[int], starts: Sequence[int], ends: Sequence[int], step: int = 1) -> Value:
    given = (starts, ends, axes, [step] * len(axes))
    return x.graph.node("Slice", x, *(x.graph.shape(each) for each in given))


def _roll(x: Value, shift: int, axis: int, size: int) -> Value:
    """The tensor with the last `shift` elements of an axis moved to the front."""
    if size == -1:
        raise ExportError(f"{x.graph.scope}: a roll along the batch has no ONNX form here; roll along another axis")
    cut = -shift % size
    parts = [_slice(x, (axis,), (start,), (end,)) for start, end in ((cut, size), (0, cut))]
    return x.graph.node("Concat", *parts, axis=axis)


def _pad(x: Value, amounts: Sequence[int], value: int, rank: int) -> Value:
    """The padded tensor; `amounts` are pairs before and after each axis, the last axis first."""
    before, after = ([0] * (rank - len(amounts) // 2) + list(amounts[side::2])[::-1] for side in (0, 1))
    return x.graph.node("Pad", x, x.graph.shape([*before, *after]), x.graph.scalar(value, x.dtype))

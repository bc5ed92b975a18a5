"""Run a segment on a batch a few images at a time, whose tensors then stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitquant.graph.segments import Segment

_AT_ONCE = 10  # images: DeiT-Tiny's simulation is 1.7 times as fast as with 100


def in_parts(segment: Segment, tensors: Sequence[Tensor], images: int) -> tuple[Tensor, ...]:
    """The outputs of a segment for a batch, each output for all of its images.

    Arguments:
        segment: its outputs are given as a sequence of names.
        tensors: its inputs.
        images: the number of images in them.

    Pitfall: a sum of products may be rounded differently when it is computed for another number of images; and a tensor
        whose axis holds something else before the images, such as tokens, comes in another order than of the whole.
    """
    pieces: list[list[Tensor]] = [[] for _ in range(0, images, _AT_ONCE)]
    for tensor, axis in zip(tensors, segment.axes, strict=True):
        if axis is None:
            parts = [tensor] * len(pieces)
        else:
            parts = list(tensor.split(_AT_ONCE * (tensor.shape[axis] // images), axis))
        for piece, part in zip(pieces, parts, strict=True):
            piece.append(part)
    outputs = [segment(*piece) for piece in pieces]
    axes = [segment.shapes[name].index(-1) for name in segment.outputs]
    return tuple(torch.cat(each, axis) for each, axis in zip(zip(*outputs, strict=True), axes, strict=True))

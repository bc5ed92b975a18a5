"""The squared change of a tensor, as a share of the float tensor's own squares."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """The sum of squares of the difference over that of the float tensor, of each image: (images,), differentiable.

    Arguments:
        found: what the quantized model gives, (images, ...).
        expected: what the float model gives, of the same shape.
    """
    squares = expected.flatten(1).square().sum(1)
    return (found - expected).flatten(1).square().sum(1) / squares.clamp(min=torch.finfo(squares.dtype).tiny)


def shift_free_error(found: Tensor, expected: Tensor) -> Tensor:
    """`relative_error` of (images, ..., channels), without what all channels have in common, in either."""
    return relative_error(*(x - x.mean(-1, keepdim=True) for x in (found, expected)))

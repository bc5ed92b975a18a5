"""The squared error of a tensor relative to the sum of squares of the float tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """The sum of squares of the difference over that of the float tensor, of each image: (images,), differentiable.

    Arguments:
        found: the quantized model's tensor, (images, ...).
        expected: the float model's tensor, of the same shape.
    """
    squares = expected.reshape(len(expected), -1).square().sum(1)
    return (found - expected).reshape(len(expected), -1).square().sum(1) / squares.clamp(
        min=torch.finfo(squares.dtype).tiny
    )


def shift_free_error(found: Tensor, expected: Tensor) -> Tensor:
    """`relative_error` of tensors (images, ..., channels) after the mean over the channels is subtracted from both."""
    return relative_error(*(x - x.mean(-1, keepdim=True) for x in (found, expected)))

"""The squared change of an output, as a share of the float output's own squares."""

from __future__ import annotations

import torch
from torch import Tensor


def output_error(found: Tensor, expected: Tensor) -> Tensor:
    """The sum of squares of the difference over that of the float output, of each image: (images,), differentiable.

    What all classes of an image have in common is left out of both: it changes no probability.

    Arguments:
        found: what the quantized model gives, (images, ..., classes or features).
        expected: what the float model gives, of the same shape.
    """
    found, expected = (x - x.mean(-1, keepdim=True) for x in (found, expected))
    squares = expected.flatten(1).square().sum(1)
    smallest = torch.finfo(squares.dtype).tiny
    return (found - expected).flatten(1).square().sum(1) / squares.clamp(min=smallest)

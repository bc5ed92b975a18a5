"""The total variation of images, which is large for noise and small for smooth images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_VALUES = 32 * 3 * 224 * 224  # of the batch for which the published values are


def total_variation(images: Tensor) -> Tensor:
    """The sum of the Euclidean norms of the differences between neighbours in four directions, for each image.

    It is scaled to what 32 such images of 3 x 224 x 224 have together, whose norm is the published quantity, so that
    published values hold for any number and size of images.

    Arguments:
        images: (images, channels, height, width).

    Returns:
        (images,), of the images' dtype, differentiable.

    Source: PSAQ-ViT's code, after DeepInversion, Yin et al. 2020.
    """
    differences = (
        images[..., 1:] - images[..., :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., 1:, 1:] - images[..., :-1, :-1],
    )
    norms = [torch.linalg.vector_norm(each.flatten(1), dim=1) for each in differences]
    return torch.stack(norms).sum(0) * math.sqrt(_VALUES / images[0].numel())

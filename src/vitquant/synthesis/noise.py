"""Images of noise: what images that are made for a model begin with, and a baseline for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_RADII = (0.04, 0.5)  # of leaves, in the side of a square as large as the image
_COMMON = 0.7  # the correlation of the channels of a color


@dataclass(frozen=True)
class NoiseSettings:
    """Noise has no settings."""


def gaussian_noise(shape: Sequence[int], limits: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """An image of independent normal numbers with mean 0 and standard deviation 1, some of them beyond the limits.

    Arguments:
        shape: (channels, height, width).
        limits: the least and the largest normalized value of each channel, (channels, 1, 1) each.
        generator: of the numbers.
    """
    return torch.randn(*shape, generator=generator)


def uniform_noise(shape: Sequence[int], limits: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """An image of independent numbers that are uniform between the limits; arguments as of `gaussian_noise`."""
    return torch.lerp(*torch.broadcast_tensors(*limits, torch.rand(*shape, generator=generator)))


def dead_leaves(shape: Sequence[int], limits: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """An image of discs of one color that cover each other; arguments as of `gaussian_noise`.

    Centers are uniform in the image, radii r have a density proportional to r^-3 between 0.04 and 0.5 of the side of a
    square as large as the image, and colors are normal with mean 0, standard deviation 1 and a correlation of 0.7
    between channels. So it has the edges, the areas and about the spectrum of photographs. Some values are beyond the
    limits.

    Source: Lee, Mumford and Huang, Occlusion models for natural images, IJCV 2001.
    """
    channels, height, width = shape
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    least, most = (radius * math.sqrt(height * width) for radius in _RADII)
    image, covered = torch.zeros(channels, height, width), torch.zeros(height, width, dtype=torch.bool)
    while not bool(covered.all()):  # the nearest leaf first
        row, column, place = torch.rand(3, generator=generator).tolist()
        common, own = torch.randn(1, generator=generator), torch.randn(channels, generator=generator)
        radius = (least**-2 - (least**-2 - most**-2) * place) ** -0.5
        leaf = (rows - row * height) ** 2 + (columns - column * width) ** 2 <= radius**2
        color = math.sqrt(_COMMON) * common + math.sqrt(1 - _COMMON) * own
        image = torch.where(leaf & ~covered, color[:, None, None], image)
        covered |= leaf
    return image


Noise = Callable[[Sequence[int], tuple[Tensor, Tensor], torch.Generator], Tensor]
NOISES: dict[str, Noise] = {
    "gaussian-noise": gaussian_noise,
    "uniform-noise": uniform_noise,
    "dead-leaves": dead_leaves,
}

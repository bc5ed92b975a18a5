"""Images of noise, as a baseline for images that are made for a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSettings:
    """Noise has no settings."""


def gaussian_noise(shape: Sequence[int], limits: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """An image of independent normal numbers with mean 0 and standard deviation 1, clamped to the limits.

    Arguments:
        shape: (channels, height, width).
        limits: the least and the largest normalized value of each channel, (channels, 1, 1) each.
        generator: of the numbers.
    """
    return torch.randn(*shape, generator=generator).clamp(*limits)


def uniform_noise(shape: Sequence[int], limits: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
    """An image of independent numbers that are uniform between the limits; arguments as of `gaussian_noise`."""
    return torch.lerp(*torch.broadcast_tensors(*limits, torch.rand(*shape, generator=generator)))


Noise = Callable[[Sequence[int], tuple[Tensor, Tensor], torch.Generator], Tensor]
NOISES: dict[str, Noise] = {"gaussian-noise": gaussian_noise, "uniform-noise": uniform_noise}

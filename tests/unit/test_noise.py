"""Dead leaves have the statistics that they are said to have."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitquant.synthesis.noise import dead_leaves

LIMITS = torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0)


def leaves(shape: tuple[int, int, int], seed: int) -> Tensor:
    return dead_leaves(shape, LIMITS, torch.Generator().manual_seed(seed))


@given(st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_every_pixel_is_of_a_leaf_and_the_seed_gives_the_same_image(shape, seed) -> None:
    image = leaves(shape, seed)
    assert image.shape == shape
    assert torch.isfinite(image).all()
    assert (image != 0).any(0).all()  # no color is exactly that of no leaf
    assert torch.equal(image, leaves(shape, seed))


def test_colors_are_those_of_normalized_photographs() -> None:
    images = torch.stack([leaves((3, 8, 8), seed) for seed in range(400)])
    assert abs(images.mean()) < 0.08
    assert abs(images.square().mean() - 1) < 0.08
    correlation = torch.corrcoef(images.transpose(0, 1).flatten(1))
    torch.testing.assert_close(correlation, torch.full((3, 3), 0.7).fill_diagonal_(1), rtol=0, atol=0.06)


def test_radii_are_of_the_power_law() -> None:
    """The nearest leaf is seen whole: its area gives its radius, whose distribution is known."""
    side, least, most = 100, 4.0, 50.0
    found = []
    for seed in range(120):
        generator = torch.Generator().manual_seed(seed)
        row, column, _ = torch.rand(3, generator=generator).tolist()
        common, own = torch.randn(1, generator=generator), torch.randn(1, generator=generator)
        color = (math.sqrt(0.7) * common + math.sqrt(0.3) * own)[0]
        here = (leaves((1, side, side), seed)[0] == color).nonzero() + 0.5
        found.append((here - torch.tensor([row, column]) * side).norm(dim=1).max().item())
    assert all(least - 1 <= radius <= most for radius in found)
    for radius in (5.0, 8.0, 15.0):
        expected = (least**-2 - radius**-2) / (least**-2 - most**-2)
        assert sum(each <= radius for each in found) / len(found) == pytest.approx(expected, abs=0.12)


def test_it_has_nearly_the_spectrum_of_photographs() -> None:
    """The amplitude falls about as 1/f: its logarithm by that of the frequency has a slope near -1.2."""
    side = 128
    images = torch.stack([leaves((1, side, side), seed)[0] for seed in range(30)])
    power = torch.fft.fft2(images).abs().square().mean(0)
    frequencies = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.fftfreq(side))
    amplitudes = []
    for low in (1 / 32, 1 / 16, 1 / 8, 1 / 4):
        ring = (frequencies >= low) & (frequencies < 1.2 * low)
        amplitudes.append(power[ring].mean().sqrt().log2())
    slopes = torch.stack(amplitudes).diff()
    assert slopes.mean().item() == pytest.approx(-1.3, abs=0.25)

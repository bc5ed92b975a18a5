"""The patch-similarity entropy and the total variation against the direct formulas in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitquant.objectives import patch_similarity
from vitquant.objectives.patch_similarity import patch_entropy
from vitquant.objectives.total_variation import total_variation

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(2, 9), st.integers(1, 5))


def directly(features: torch.Tensor, bandwidth: float, points: int) -> torch.Tensor:
    """Equations 6 to 9 as they are written: every pair, every point, one image at a time."""
    entropies = []
    for image in features.to(torch.float64):
        pairs = []
        for window in image:
            for first in window:
                for second in window:
                    pairs.append(first @ second / (first.norm() * second.norm()).clamp(min=1e-12))
        similarities = torch.stack(pairs)
        low, high = similarities.detach().min().item(), similarities.detach().max().item()
        positions = [low + (high - low) * place / (points - 1) for place in range(points)]
        kernels = [
            (-((t - similarities) ** 2) / (2 * bandwidth**2)).exp() / (bandwidth * math.sqrt(2 * math.pi))
            for t in positions
        ]
        terms = [-(kernel.mean() + 1e-4) * (kernel.mean() + 1e-4).log() for kernel in kernels]
        width = (high - low) / (points - 1)
        entropies.append(sum((left + right) / 2 * width for left, right in pairwise(terms)))
    return torch.stack(entropies)


@given(SHAPES, st.floats(0.01, 0.5), st.integers(2, 20), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_entropy_and_its_gradient_are_those_of_the_direct_formula(shape, bandwidth, points, seed):
    features = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    given, expected = features.clone().requires_grad_(True), features.clone().requires_grad_(True)
    found, wanted = patch_entropy(given, bandwidth, points), directly(expected, bandwidth, points)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)
    weights = torch.arange(1.0, shape[0] + 1, dtype=torch.float64)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    # the direct formula differentiates pairs of a patch with itself, too: their gradient is zero but for rounding
    torch.testing.assert_close(given.grad, expected.grad, rtol=1e-6, atol=1e-7 * max(1, expected.grad.abs().max()))


def test_the_gradient_is_that_of_finite_differences():
    features = torch.randn(2, 2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def of_fixed_positions(x: torch.Tensor) -> torch.Tensor:
        """The positions move with the ends, which have no gradient: with a patch and its opposite the ends stay."""
        fixed = torch.tensor([1.0, 0.0, 0.0], dtype=x.dtype).expand(2, 2, 1, 3)
        return patch_entropy(torch.cat([x, fixed, -fixed], dim=2), bandwidth=0.2)

    assert torch.autograd.gradcheck(of_fixed_positions, features.requires_grad_(True))


def test_images_are_independent_and_may_be_computed_a_few_at_a_time(monkeypatch):
    features = torch.randn(7, 2, 6, 4, generator=torch.Generator().manual_seed(2))
    together = features.clone().requires_grad_(True)
    whole = patch_entropy(together)
    whole.sum().backward()
    for at_once in (1, 100):
        monkeypatch.setattr(patch_similarity, "_AT_ONCE", at_once)
        apart = features.clone().requires_grad_(True)
        parts = patch_entropy(apart)
        parts.sum().backward()
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(apart.grad, together.grad)
    torch.testing.assert_close(torch.cat([patch_entropy(each) for each in features.split(2)]), whole)


@pytest.mark.parametrize("features", [torch.zeros(2, 1, 4, 3), torch.ones(2, 1, 4, 3)], ids=["zero", "equal"])
def test_patches_that_are_all_alike_have_a_finite_entropy_and_gradient(features):
    features.requires_grad_(True)
    entropy = patch_entropy(features)
    entropy.sum().backward()
    assert torch.isfinite(entropy).all()
    assert torch.isfinite(features.grad).all()


def test_half_precision_is_computed_in_single():
    features = torch.randn(1, 1, 8, 4, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    found = patch_entropy(features)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, patch_entropy(features.float()))


def test_patches_in_clusters_have_a_higher_entropy_than_noise():
    generator = torch.Generator().manual_seed(4)
    noise = 1 + 0.02 * torch.randn(1, 1, 60, 16, generator=generator)
    centres = torch.randn(4, 16, generator=generator)
    clusters = centres[torch.arange(60) % 4] + 0.3 * torch.randn(60, 16, generator=generator)
    assert patch_entropy(clusters[None, None]) > patch_entropy(noise) + 0.1


@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_total_variation_is_the_sum_of_four_norms_scaled_to_the_published_batch(count, channels, height, width, seed):
    images = torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(seed)).double()
    for image, found in zip(images, total_variation(images), strict=True):
        total = 0.0
        for down, right in ((0, 1), (1, 0), (1, -1), (1, 1)):
            squares = 0.0
            for y in range(height - down):
                for x in range(max(0, -right), width - max(0, right)):
                    squares += (image[:, y + down, x + right] - image[:, y, x]).square().sum().item()
            total += math.sqrt(squares)
        scale = math.sqrt(32 * 3 * 224 * 224 / image.numel())
        assert found.item() == pytest.approx(total * scale, rel=1e-9)

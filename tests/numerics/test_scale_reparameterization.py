"""Scale reparameterization against RepQ-ViT's equations in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitquant.methods.scale_reparameterization import reparameterization
from vitquant.spec import QuantSpec

law = settings(max_examples=100, deadline=None)
SPECS = st.builds(QuantSpec, st.integers(2, 8), st.booleans(), st.booleans())


@st.composite
def ranges(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Of channels that lie anywhere, vary by orders of magnitude, and now and then not at all."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    channels, spread = draw(st.integers(1, 12)), draw(st.sampled_from([0.0, 1.0, 3.0]))
    width = torch.exp(spread * torch.randn(channels, dtype=torch.float64, generator=random))
    width *= torch.rand(channels, generator=random) > draw(st.sampled_from([0.0, 0.3, 1.0]))
    low = draw(st.sampled_from([0.0, 0.5, 20.0])) * torch.randn(channels, dtype=torch.float64, generator=random) - width
    return low, low + 2 * width


@law
@given(ranges(), SPECS, st.integers(0, 2**31))
def test_codes_are_those_of_a_scale_and_a_zero_point_for_each_channel(
    limits: tuple[Tensor, Tensor], spec: QuantSpec, seed: int
) -> None:
    low, high = limits
    spec = QuantSpec(spec.bits, spec.signed)
    found = reparameterization(low, high, spec, shiftable=True)
    random = torch.Generator().manual_seed(seed)
    x = low + (high - low) * torch.rand(50, len(low), dtype=torch.float64, generator=random)
    scale = found.scale * found.ratio
    zero_point = torch.round(found.zero_point - found.shift / found.scale)
    assert bool(((spec.qmin - low / scale - zero_point).abs() <= 0.5 + 1e-9).all())  # the channel's own, rounded
    position = (x / found.ratio - found.shift) / found.scale + found.zero_point
    expected = x / scale + zero_point
    assert torch.allclose(position, expected, rtol=0, atol=1e-9 * float(1 + zero_point.abs().max()))
    assert bool((position >= spec.qmin - 0.5 - 1e-6).all())
    assert bool((position <= spec.qmax + 0.5 + 1e-6).all())


@law
@given(ranges(), SPECS)
def test_scale_and_ratio_are_the_published_means(limits: tuple[Tensor, Tensor], spec: QuantSpec) -> None:
    """RepQ-ViT: s~ = mean s_c, r_1 = s_c / s~, r_2 = z~ - z_c in steps; z~ is their mean, rounded and kept in range."""
    low, high = limits
    spec = QuantSpec(spec.bits, spec.signed)
    found = reparameterization(low, high, spec, shiftable=True)
    scale = (high - low) / (spec.qmax - spec.qmin)
    if bool((scale >= 2**-10 * scale.mean()).all()) and bool(scale.any()):
        zero_point = spec.qmin - torch.round(low / scale)
        mean = zero_point.mean().round().clamp(spec.qmin, spec.qmax)
        assert torch.allclose(found.scale, scale.mean())
        assert torch.allclose(found.ratio, scale / scale.mean())
        assert found.zero_point == mean
        assert torch.allclose(found.shift, scale.mean() * (mean - zero_point), rtol=1e-9)


@law
@given(ranges(), SPECS)
def test_without_a_shift_every_channel_s_range_is_covered_and_zero_stays(
    limits: tuple[Tensor, Tensor], spec: QuantSpec
) -> None:
    low, high = limits
    found = reparameterization(low, high, spec, shiftable=spec.symmetric)
    assert not bool(found.shift.any())
    if spec.symmetric:
        assert float(found.zero_point) == (0 if spec.signed else 2 ** (spec.bits - 1))
    ends = torch.stack([low, high]) / found.ratio / found.scale + found.zero_point
    assert bool((ends >= spec.qmin - 0.5 - 1e-6).all())
    assert bool((ends <= spec.qmax + 0.5 + 1e-6).all())


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-3])
@pytest.mark.parametrize("shiftable", [False, True])
def test_channels_that_never_vary_are_harmless(value: float, shiftable: bool) -> None:
    low = torch.tensor([value, value, -1.0], dtype=torch.float64)
    high = torch.tensor([value, value, 1.0], dtype=torch.float64)
    for some in (slice(None), slice(0, 2)):
        found = reparameterization(low[some], high[some], QuantSpec(4), shiftable)
        for each in (found.scale, found.ratio, found.shift):
            assert bool(torch.isfinite(each).all())
        assert bool((found.ratio > 0).all())
        codes = (low[some] / found.ratio - found.shift) / found.scale + found.zero_point
        assert bool(((codes >= -0.5 - 1e-6) & (codes <= 15.5 + 1e-6)).all())

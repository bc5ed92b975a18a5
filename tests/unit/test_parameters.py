"""From ranges to quantization parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitquant.quantizers import build_quantizer, params_from_range
from vitquant.spec import (
    Log2,
    LogSqrt2,
    PerAxis,
    PowerOfTwoFactor,
    PowerOfTwoScale,
    QParams,
    QuantSpec,
    Scheme,
    TwinUniform,
    Uniform,
)

EPS = torch.finfo(torch.float32).eps
UNIFORM = [
    QuantSpec(bits, signed, symmetric, scheme=scheme)
    for bits in (2, 3, 4, 8, 16)
    for signed in (False, True)
    for symmetric in (False, True)
    for scheme in (Uniform(), PowerOfTwoScale())
]


def params_of(low: float, high: float, spec: QuantSpec) -> QParams:
    return params_from_range(torch.tensor(low), torch.tensor(high), spec)


def test_unsigned_asymmetric() -> None:
    params = params_of(-1.0, 4.1, QuantSpec(8))
    assert float(params.scale) == pytest.approx(5.1 / 255)
    assert (params.zero_point.item(), params.zero_point.dtype) == (50, torch.int32)  # type: ignore[union-attr]
    assert (params.scale.dtype, params.factor) == (torch.float32, None)


def test_signed_asymmetric() -> None:
    params = params_of(-1.0, 4.1, QuantSpec(8, signed=True))
    assert float(params.scale) == pytest.approx(5.1 / 255)
    assert params.zero_point == 50 - 128


def test_signed_symmetric_is_that_of_fq_vit() -> None:
    params = params_of(-1.0, 4.1, QuantSpec(8, signed=True, symmetric=True))
    assert float(params.scale) == pytest.approx(4.1 / 127.5)
    assert params.zero_point == 0


def test_unsigned_symmetric_has_zero_in_the_middle() -> None:
    params = params_of(-4.1, 1.0, QuantSpec(4, symmetric=True))
    assert float(params.scale) == pytest.approx(4.1 / 7.5)
    assert params.zero_point == 8


@pytest.mark.parametrize(("low", "high", "zero_point"), [(2.0, 5.1, 0), (-5.1, -2.0, 255)])
def test_range_is_widened_to_hold_zero(low: float, high: float, zero_point: int) -> None:
    params = params_of(low, high, QuantSpec(8))
    assert float(params.scale) == pytest.approx(5.1 / 255)
    assert params.zero_point == zero_point


@pytest.mark.parametrize("spec", UNIFORM)
def test_zeros_get_the_smallest_scale_and_stay_zero(spec: QuantSpec) -> None:
    params = params_of(0.0, 0.0, spec)
    assert float(params.scale) == EPS
    assert build_quantizer(spec, params)(torch.zeros(2)).tolist() == [0.0, 0.0]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(UNIFORM), st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32))
def test_nothing_in_the_range_is_more_than_half_a_step_off(spec: QuantSpec, a: float, b: float) -> None:
    low, high = torch.tensor([min(a, b)]), torch.tensor([max(a, b)])
    params = params_from_range(low, high, spec)
    quantizer = build_quantizer(replace(spec, granularity=PerAxis(0)), params)
    x = torch.lerp(low, high, torch.linspace(0, 1, 41))[None]
    error = (quantizer(x) - x).abs()
    # symmetric codes: at most the half step that they stop short of the maximum, as documented
    assert bool((error <= quantizer.error_bound(x) + 2 * EPS * x.abs().max()).all())
    assert float(quantizer(torch.zeros(1, 1))) == 0.0


@settings(max_examples=100, deadline=None)
@given(st.floats(2**-20, 1e6, width=32), st.booleans())
def test_power_of_two_scale_is_the_next_power_of_two(high: float, symmetric: bool) -> None:
    spec = QuantSpec(8, symmetric=symmetric)
    exact = params_of(-high / 3, high, spec).scale
    scale = params_of(-high / 3, high, replace(spec, scheme=PowerOfTwoScale())).scale
    assert torch.frexp(scale).mantissa == 0.5
    assert exact <= scale < 2 * exact


@pytest.mark.parametrize("exponent", [-23, -1, 0, 5])
def test_power_of_two_scale_keeps_a_power_of_two(exponent: int) -> None:
    high = torch.tensor(255.0 * 2**exponent)
    assert params_from_range(torch.zeros(()), high, QuantSpec(8, scheme=PowerOfTwoScale())).scale == 2.0**exponent


def test_power_of_two_zero_point_is_that_of_the_rounded_scale() -> None:
    params = params_of(-3.0, 5.0, QuantSpec(4, scheme=PowerOfTwoScale()))
    assert (params.scale, params.zero_point) == (1.0, 3)


TWINS = [QuantSpec(bits, scheme=TwinUniform(shift)) for bits in (2, 4, 6, 8) for shift in (1, 2, 3)]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(TWINS), st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32))
def test_twin_steps_end_at_most_half_a_coarse_step_short_of_the_range(spec: QuantSpec, a: float, b: float) -> None:
    low, high = torch.tensor([min(a, b, 0.0)]), torch.tensor([max(a, b, 0.0)])
    params = params_from_range(low, high, spec)
    quantizer = build_quantizer(replace(spec, granularity=PerAxis(0)), params)
    assert isinstance(spec.scheme, TwinUniform)
    half = params.scale * (2.0**spec.scheme.shift + 1) / 2
    first, last = quantizer.range()
    assert bool((torch.maximum(first - low, high - last) <= half * (1 + 1e-5)).all())
    assert float(quantizer(torch.zeros(1, 1))) == 0.0


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (-4.0, 155.0, 1.0, 4),  # all coarse codes above
        (-155.0, 4.0, 1.0, 59),  # all of them below: 27 fine codes, and 32 coarse ones
        (-76.0, 83.0, 1.0, 31),  # 16 fine steps below zero and 15 coarse ones
        (0.0, 159.0, 1.0, 0),
        (-159.0, 0.0, 1.0, 63),
    ],
)
def test_where_twin_steps_have_their_zero(low: float, high: float, scale: float, zero_point: int) -> None:
    params = params_of(low, high, QuantSpec(6, scheme=TwinUniform(2)))
    assert (float(params.scale), params.zero_point) == (scale, zero_point)
    quantizer = build_quantizer(QuantSpec(6, scheme=TwinUniform(2)), params)
    assert [float(end) for end in quantizer.range()] == [low, high]


@pytest.mark.parametrize("scheme", [Log2(), LogSqrt2()])
def test_the_scale_of_powers_is_the_maximum(scheme: Scheme) -> None:
    params = params_from_range(torch.tensor([0.0, -1.0]), torch.tensor([0.7, -1.0]), QuantSpec(4, scheme=scheme))
    assert torch.equal(params.scale, torch.tensor([0.7, EPS]))
    assert params.zero_point is None


def test_factors_are_the_smallest_that_cover_each_channel() -> None:
    spec = QuantSpec(8, granularity=PerAxis(-1), scheme=PowerOfTwoFactor(4))
    high = torch.tensor([8.0, 4.01, 4.0, 2.0, 1.0, 0.5, 0.0])
    params = params_from_range(-0.9 * high, high, spec)
    assert float(params.scale) == pytest.approx(15.2 / 255 / 8)
    assert params.zero_point == 121
    # 134 codes and a half above zero: the step of 15.2 / 255 / 2 reaches to 4.0085
    assert params.factor is not None
    assert params.factor.tolist() == [3, 3, 2, 1, 0, 0, 0]
    assert params.factor.dtype == torch.int32


def test_a_channel_that_no_factor_covers_gets_the_coarsest() -> None:
    """The step is 1 and both ends are halves that round away from zero: 244 + 12 is one code too many."""
    spec = QuantSpec(8, granularity=PerAxis(-1), scheme=PowerOfTwoFactor(4))
    params = params_from_range(torch.tensor([-11.5, -1.0]), torch.tensor([243.5, 1.0]), spec)
    assert (params.scale, params.zero_point) == (1 / 8, 12)
    assert params.factor is not None
    assert params.factor.tolist() == [3, 0]


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 16), st.integers(1, 8), st.integers(0, 2**31))
def test_factors_cover_and_no_smaller_one_would(bits: int, factors: int, seed: int) -> None:
    spec = QuantSpec(bits, granularity=PerAxis(-1), scheme=PowerOfTwoFactor(factors))
    random = torch.Generator().manual_seed(seed)
    center, width = torch.randn(6, generator=random), torch.randn(6, generator=random).exp()
    low, high = center - width, center + width
    params = params_from_range(low, high, spec)
    assert params.factor is not None
    zero_point = params.zero_point
    assert zero_point is not None
    ends = torch.stack([low.clamp(max=0), high.clamp(min=0)]).double()

    def saturates(factor: torch.Tensor) -> torch.Tensor:
        codes = (ends / (params.scale.double() * 2.0**factor)).round() + zero_point
        return ((codes < 0) | (codes > spec.qmax)).any(0)

    assert not bool((saturates(params.factor) & (params.factor < factors - 1)).any())
    assert bool((saturates(params.factor - 1.0) | (params.factor == 0)).all())
    assert build_quantizer(spec, params).step.max() <= params.scale * 2 ** (factors - 1)


@pytest.mark.parametrize("scheme", [Uniform(), PowerOfTwoScale(), Log2(), LogSqrt2()])
def test_channels_are_independent(scheme: Scheme) -> None:
    spec = QuantSpec(8, scheme=scheme)
    low, high = torch.tensor([-1.0, 0.0, -3.0]), torch.tensor([1.0, 2.0, 7.0])
    together = params_from_range(low, high, spec)
    for i in range(3):
        alone = params_from_range(low[i], high[i], spec)
        assert alone.scale.shape == ()
        assert together.scale[i] == alone.scale
        if alone.zero_point is not None and together.zero_point is not None:
            assert together.zero_point[i] == alone.zero_point

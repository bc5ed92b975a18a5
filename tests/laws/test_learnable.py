"""Laws of what is learned in a quantizer: it begins where that is, has gradients, and hardens to plain numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitquant.errors import CalibrationError
from vitquant.quantizers import build_quantizer, params_from_range
from vitquant.quantizers.learnable import LearnedRounding, LearnedScale, LearnedZeroPoint
from vitquant.quantizers.uniform import UniformQuantizer
from vitquant.spec import PerAxis, PerTensor, QuantSpec

seeds = st.integers(0, 10_000)
widths = st.integers(2, 8)


def quantizer_of(spec: QuantSpec, x: torch.Tensor) -> UniformQuantizer:
    """A quantizer that clips some of the elements."""
    axes = () if isinstance(spec.granularity, PerTensor) else (1,)
    low, high = (0.7 * (x.amin(axes) if axes else x.min()), 0.7 * (x.amax(axes) if axes else x.max()))
    found = build_quantizer(spec, params_from_range(low, high, spec))
    assert isinstance(found, UniformQuantizer)
    return found


def values(seed: int) -> torch.Tensor:
    return torch.randn(4, 9, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(seed=seeds, bits=widths, per_channel=st.booleans())
def test_nothing_learned_changes_nothing(seed: int, bits: int, per_channel: bool) -> None:
    x = values(seed)
    spec = QuantSpec(bits, granularity=PerAxis(0) if per_channel else PerTensor())
    quantizer = quantizer_of(spec, x)
    expected, scale, zero = quantizer(x), quantizer.scale.clone(), quantizer.zero_point
    assert zero is not None
    zero = zero.clone()
    for learned in (LearnedScale.of(quantizer), LearnedZeroPoint.of(quantizer)):
        learned.put()
        assert torch.equal(quantizer(x), expected)
        learned.harden()
        assert torch.equal(quantizer(x), expected)
    assert torch.equal(quantizer.scale, scale)
    assert torch.equal(quantizer.zero_point, zero)
    assert quantizer.zero_point.dtype == torch.int32
    assert not quantizer.scale.requires_grad


@settings(max_examples=40, deadline=None)
@given(seed=seeds, bits=widths)
def test_a_scale_has_the_gradient_of_lsq(seed: int, bits: int) -> None:
    x = values(seed)
    quantizer = quantizer_of(QuantSpec(bits), x)
    learned = LearnedScale.of(quantizer)
    learned.put()
    quantizer(x).sum().backward()
    assert quantizer.zero_point is not None
    spec, scale, zero = quantizer.spec, learned.calibrated.item(), quantizer.zero_point.item()
    expected = 0.0
    for value in x.flatten().tolist():
        ratio = value / scale
        level = min(max(round(ratio), spec.qmin - zero), spec.qmax - zero)
        inside = spec.qmin - zero <= round(ratio) <= spec.qmax - zero
        expected += scale * (level - ratio if inside else level)  # the logarithm's gradient is the scale's times it
    assert learned.logarithm.grad is not None
    assert learned.logarithm.grad.item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, bits=widths, per_channel=st.booleans())
def test_a_zero_point_moves_what_is_clipped(seed: int, bits: int, per_channel: bool) -> None:
    x = values(seed)
    quantizer = quantizer_of(QuantSpec(bits, granularity=PerAxis(0) if per_channel else PerTensor()), x)
    learned = LearnedZeroPoint.of(quantizer)
    learned.put()
    quantizer(x).sum().backward()
    assert quantizer.zero_point is not None
    zero, step = (quantizer.step_along(x) * 0 + each for each in (0, 1))
    zero = quantizer.zero_point.detach().reshape(-1, 1) if per_channel else quantizer.zero_point.detach()
    level, step = torch.round(x / quantizer.step_along(x)), quantizer.step_along(x).expand_as(x)
    clipped = (level < quantizer.spec.qmin - zero) | (level > quantizer.spec.qmax - zero)
    expected = -(step * clipped).sum(1 if per_channel else (0, 1))
    torch.testing.assert_close(learned.position.grad, expected, rtol=1e-4, atol=1e-5)


def test_a_moved_zero_point_is_an_integer_among_the_codes() -> None:
    quantizer = quantizer_of(QuantSpec(4), values(0))
    for moved, expected in ((0.4, 0), (3.6, 4), (99.0, 15), (-7.0, 0)):
        learned = LearnedZeroPoint.of(quantizer)
        with torch.no_grad():
            learned.position.fill_(moved)
        learned.put()
        assert float(quantizer.zero_point) == expected  # type: ignore[arg-type]
        learned.harden()
        assert (int(quantizer.zero_point), quantizer.zero_point.dtype) == (expected, torch.int32)  # type: ignore


def test_a_fixed_zero_point_is_not_learned() -> None:
    quantizer = quantizer_of(QuantSpec(4, signed=True, symmetric=True), values(0))
    with pytest.raises(CalibrationError, match="is fixed"):
        LearnedZeroPoint.of(quantizer)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, bits=widths, per_channel=st.booleans())
def test_rounding_begins_at_the_weight_and_ends_at_a_level_beside_it(seed: int, bits: int, per_channel: bool) -> None:
    weight = values(seed)
    spec = QuantSpec(bits, signed=True, symmetric=True, granularity=PerAxis(0) if per_channel else PerTensor())
    quantizer, before = quantizer_of(spec, weight), weight.clone()
    step = quantizer.step_along(weight)
    learned = LearnedRounding.of(quantizer, weight)
    learned.put()
    inside = (weight / step).floor().ge(spec.qmin) & (weight / step).floor().lt(spec.qmax)
    torch.testing.assert_close(quantizer(weight)[inside], weight[inside], rtol=0, atol=1e-4)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        learned.offset.copy_(torch.randn(weight.shape, generator=generator) * 3)
    up = [1 if 1.2 / (1 + math.exp(-v)) - 0.1 >= 0.5 else 0 for v in learned.offset.flatten().tolist()]
    levels = [
        min(max(math.floor(w) + u, spec.qmin), spec.qmax)
        for w, u in zip((before / step).flatten().tolist(), up, strict=True)
    ]
    learned.harden()
    assert quantizer.rounding is None
    assert quantizer.encode(weight).flatten().tolist() == levels  # plain rounding finds them again
    assert torch.equal(quantizer(weight), weight)


def test_gradients_reach_the_offsets_that_are_not_decided() -> None:
    weight = values(1)
    quantizer = quantizer_of(QuantSpec(4, signed=True, symmetric=True), weight)
    learned = LearnedRounding.of(quantizer, weight)
    with torch.no_grad():
        learned.offset[0] = 20.0
    learned.put()
    (quantizer(weight).sum() + learned.undecided(4.0)).backward()
    assert learned.offset.grad is not None
    assert bool((learned.offset.grad[0] == 0).all())  # rectified: decided
    assert bool((learned.offset.grad[1:] != 0).any())
    undecided = learned.undecided(4.0).item()
    expected = sum(1 - abs(2 * h - 1) ** 4 for h in learned.share().flatten().tolist())
    assert undecided == pytest.approx(expected, rel=1e-4)

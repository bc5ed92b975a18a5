"""The laws that every quantizer keeps, whatever its scheme, bits, sign, granularity and operand dtype."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitquant.quantizers import Quantizer, build_quantizer
from vitquant.quantizers.logarithmic import threshold
from vitquant.quantizers.quantizer import along_axis, channel_axis, code_dtype
from vitquant.spec import (
    Log2,
    Logarithmic,
    LogSqrt2,
    PerAxis,
    PerHead,
    PerTensor,
    PowerOfTwoFactor,
    PowerOfTwoScale,
    QParams,
    QuantSpec,
    Scheme,
    TwinUniform,
    Uniform,
)

SHAPE = (2, 3, 4, 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
EXACT_DTYPES = (torch.float32, torch.float64)
UP_TO_8_BITS = st.integers(2, 8)
POWERS = (Log2(), Log2(separate_zero=True), LogSqrt2(), LogSqrt2(separate_zero=True))
SCHEMES = (Uniform(), Uniform(clamp_before_round=True), PowerOfTwoScale(), PowerOfTwoFactor(), TwinUniform(), *POWERS)

law = settings(max_examples=60, deadline=None)


@dataclass(frozen=True)
class Case:
    quantizer: Quantizer
    x: Tensor

    @property
    def spec(self) -> QuantSpec:
        return self.quantizer.spec

    @property
    def largest(self) -> int:
        return largest_code(self.quantizer)

    @property
    def step(self) -> Tensor:
        return along_axis(self.quantizer.step, self.spec.granularity, self.x.ndim)

    @property
    def zero_point(self) -> Tensor:
        assert self.quantizer.zero_point is not None
        return along_axis(self.quantizer.zero_point, self.spec.granularity, self.x.ndim)


def largest_code(quantizer: Quantizer) -> int:
    """`qmax`, but one more where zero has a code of its own and a byte holds it."""
    scheme = quantizer.spec.scheme
    separate = isinstance(scheme, Logarithmic) and scheme.separate_zero and quantizer.spec.bits < 8
    return quantizer.spec.qmax + separate


def steps_of(spec: QuantSpec) -> int:
    """Levels in an octave."""
    return 2 if isinstance(spec.scheme, LogSqrt2) else 1


def twin_levels(spec: QuantSpec, zero: int) -> list[int]:
    """The integers, in fine steps, that codes 0, 1 .. stand for, counted out one by one from the code of zero."""
    assert isinstance(spec.scheme, TwinUniform)
    half, coarse = 2 ** (spec.bits - 1), 2**spec.scheme.shift
    first = min(max(zero - half // 2, 0), half)  # the first code with a fine step behind it
    steps = [1 if first <= code < first + half - 1 else coarse for code in range(spec.qmax)]
    return [sum(steps[zero:code]) - sum(steps[code:zero]) for code in range(spec.qmax + 1)]


def level_table(case: Case) -> Tensor:
    """The level of every code, for each channel's own zero: int64, of the operand's shape and one axis more."""
    zeros = case.zero_point.expand(case.x.shape)
    tables = {zero: twin_levels(case.spec, zero) for zero in zeros.unique().tolist()}
    return torch.tensor([tables[zero] for zero in zeros.flatten().tolist()]).view(*case.x.shape, -1)


@st.composite
def specs(draw: st.DrawFn, scheme: Scheme, bits: st.SearchStrategy[int]) -> QuantSpec:
    axes = st.integers(-4, 3).map(PerAxis)
    granularities = st.just(PerTensor()) | st.just(PerHead()) | axes
    match scheme:
        case PowerOfTwoFactor():
            return QuantSpec(draw(bits), granularity=draw(axes), scheme=PowerOfTwoFactor(draw(st.integers(1, 8))))
        case Log2() | LogSqrt2():
            return QuantSpec(min(draw(bits), 8), granularity=draw(granularities), scheme=scheme)
        case TwinUniform():
            shift = draw(st.integers(1, 8))
            return QuantSpec(min(draw(bits), 8), granularity=draw(granularities), scheme=TwinUniform(shift))
    return QuantSpec(draw(bits), draw(st.booleans()), draw(st.booleans()), draw(granularities), scheme)


def powers_of_two(exponent: Tensor) -> Tensor:
    """In float64, exact: torch raises to a power by functions that processors round apart."""
    return torch.tensor([2.0**each for each in exponent.flatten().tolist()], dtype=torch.float64).view(exponent.shape)


def params_for(spec: QuantSpec, random: torch.Generator) -> QParams:
    axis = channel_axis(spec.granularity)
    shape = () if axis is None else (SHAPE[axis],)
    exponent = torch.randint(-16, 9, shape, generator=random)
    scale = (1 + torch.rand(shape, generator=random)) * powers_of_two(exponent).float()
    if isinstance(spec.scheme, Logarithmic):
        return QParams(scale)
    if isinstance(spec.scheme, PowerOfTwoScale):
        scale = powers_of_two(exponent).float()
    zero = torch.randint(spec.qmin, spec.qmax + 1, shape, generator=random, dtype=torch.int32)
    if spec.symmetric:
        zero = torch.full(shape, 0 if spec.signed else 1 << (spec.bits - 1), dtype=torch.int32)
    if isinstance(spec.scheme, PowerOfTwoFactor):
        factor = torch.randint(0, spec.scheme.factors, shape, generator=random, dtype=torch.int32)
        return QParams(scale[0], zero[0], factor)
    return QParams(scale, zero)


def operand(quantizer: Quantizer, random: torch.Generator) -> Tensor:
    """Float64 values on levels, on thresholds between them, around them, beyond the range, and special ones."""
    spec = quantizer.spec
    step = along_axis(quantizer.step, spec.granularity, len(SHAPE)).double()
    offsets = torch.stack([torch.zeros(SHAPE), torch.full(SHAPE, 0.5), torch.rand(SHAPE, generator=random)])
    offset = offsets.gather(0, torch.randint(0, 3, (1, *SHAPE), generator=random))[0].double()
    if isinstance(spec.scheme, Logarithmic):
        steps = steps_of(spec)
        code = torch.randint(-1, min(largest_code(quantizer) + 2, 110 * steps), SHAPE, generator=random)
        x = step * torch.exp2(-(code + offset) / steps) * torch.where(torch.rand(SHAPE, generator=random) < 0.1, -1, 1)
    else:
        assert quantizer.zero_point is not None
        zero = along_axis(quantizer.zero_point, spec.granularity, len(SHAPE))
        if isinstance(spec.scheme, TwinUniform):
            step = step * 2.0 ** torch.randint(0, spec.scheme.shift + 1, SHAPE, generator=random)
        x = (torch.randint(spec.qmin - 3, spec.qmax + 4, SHAPE, generator=random) - zero + offset) * step
    x.view(-1)[:5] = torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf])
    return x.flatten()[torch.randperm(x.numel(), generator=random)].view(SHAPE)


@st.composite
def cases(
    draw: st.DrawFn, bits: st.SearchStrategy[int] = UP_TO_8_BITS, dtypes: tuple[torch.dtype, ...] = DTYPES
) -> Case:
    spec = draw(specs(draw(st.sampled_from(SCHEMES)), bits))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    quantizer = build_quantizer(spec, params_for(spec, random))
    return Case(quantizer, operand(quantizer, random).to(draw(st.sampled_from(dtypes))))


ALL = cases() | cases(st.integers(9, 16), EXACT_DTYPES)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, the sign of zero included."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def survives_cast(case: Case, codes: Tensor) -> Tensor:
    """Where a result rounded to the operand's dtype must still encode to the same code."""
    if case.x.dtype != torch.bfloat16 or isinstance(case.spec.scheme, Logarithmic | PowerOfTwoScale):
        return torch.ones_like(codes, dtype=torch.bool)
    if isinstance(case.spec.scheme, TwinUniform):
        return (case.quantizer.decode(codes, torch.float64) / case.step.double()).abs() <= 128
    return (codes.int() - case.zero_point).abs() <= 128


@law
@given(ALL)
def test_codes_are_integers_of_the_spec(case: Case) -> None:
    codes = case.quantizer.encode(case.x)
    assert codes.dtype == code_dtype(case.spec.bits, case.spec.signed)
    assert codes.shape == case.x.shape
    assert int(codes.min()) >= case.spec.qmin
    assert int(codes.max()) <= case.largest


@law
@given(ALL)
def test_codes_are_those_of_the_nearest_level(case: Case) -> None:
    ratio = case.x.double() / case.step.double()
    if isinstance(case.spec.scheme, Logarithmic):
        exponent = -steps_of(case.spec) * torch.log2(ratio.clamp(1e-300, 1.0))
        expected = exponent.round().clamp(max=case.largest)
        clear = (exponent - exponent.floor() - 0.5).abs() > 1e-4
    elif isinstance(case.spec.scheme, TwinUniform):
        table = level_table(case)
        integers = torch.minimum(torch.maximum(ratio.round(), table[..., 0]), table[..., -1])
        nearest = (table - integers[..., None]).abs().sort(dim=-1, stable=True)
        expected = nearest.indices[..., 0].double()
        alone = nearest.values[..., 0] < nearest.values[..., 1]
        clear = alone & (((ratio - ratio.floor() - 0.5).abs() > 1e-2) | ratio.isinf())
    else:
        expected = (ratio.round() + case.zero_point).clamp(case.spec.qmin, case.spec.qmax)
        clear = ((ratio - ratio.floor() - 0.5).abs() > 1e-2) | ratio.isinf()
    assert torch.equal(case.quantizer.encode(case.x)[clear].double(), expected[clear])


@law
@given(ALL)
def test_output_is_on_the_grid(case: Case) -> None:
    codes, work = case.quantizer.encode(case.x).double(), torch.promote_types(case.x.dtype, torch.float32)
    if isinstance(case.spec.scheme, Logarithmic):
        root = torch.tensor(math.sqrt(0.5), dtype=work).double()
        level = torch.where(codes % steps_of(case.spec) == 1, root, 1.0) * powers_of_two(
            -(codes // steps_of(case.spec))
        )
        grid = torch.where(codes == case.largest, 0.0, case.step.double() * level)
    elif isinstance(case.spec.scheme, TwinUniform):
        grid = level_table(case).gather(-1, codes[..., None].long())[..., 0] * case.step.double()
    else:
        grid = (codes - case.zero_point) * case.step.double()
    grid = grid.to(work)  # one rounding, as in the float32 product
    assert torch.equal(case.quantizer(case.x), grid.to(case.x.dtype))


@law
@given(ALL)
def test_forward_is_decode_of_encode_bit_for_bit(case: Case) -> None:
    decoded = case.quantizer.decode(case.quantizer.encode(case.x), case.x.dtype)
    assert same_bits(case.quantizer(case.x), decoded)
    assert case.quantizer.decode(case.quantizer.encode(case.x)).dtype == torch.float32


@law
@given(ALL)
def test_without_gradients_the_result_is_the_same_and_the_operand_stays(case: Case) -> None:
    x = case.x.clone()
    with_gradients = case.quantizer(x)
    with torch.no_grad():
        assert same_bits(case.quantizer(x), with_gradients.detach())
    assert same_bits(x, case.x)


@law
@given(ALL)
def test_codes_are_canonical(case: Case) -> None:
    codes = case.quantizer.encode(case.x)
    again = case.quantizer.encode(case.quantizer.decode(codes, case.x.dtype))
    kept = survives_cast(case, codes)
    assert torch.equal(again[kept], codes[kept])


@law
@given(ALL)
def test_forward_is_idempotent(case: Case) -> None:
    once = case.quantizer(case.x)
    kept = survives_cast(case, case.quantizer.encode(case.x))
    assert same_bits(case.quantizer(once)[kept], once[kept])


@law
@given(ALL)
def test_forward_is_monotone(case: Case) -> None:
    axis = channel_axis(case.spec.granularity)
    rows = case.x.reshape(1, -1) if axis is None else case.x.movedim(axis, 0).flatten(1)
    params = QParams(case.quantizer.scale, case.quantizer.zero_point, case.quantizer.factor)
    by_row = build_quantizer(replace(case.spec, granularity=PerAxis(0)), params)
    y = by_row(rows.sort(dim=1).values)
    assert bool((y[:, 1:] >= y[:, :-1]).all())


@law
@given(ALL)
def test_error_is_within_its_bound_inside_the_range(case: Case) -> None:
    low, high = (along_axis(end, case.spec.granularity, case.x.ndim) for end in case.quantizer.range())
    inside = (case.x >= low) & (case.x <= high)
    error = (case.quantizer(case.x).double() - case.x.double()).abs()
    assert bool((error <= case.quantizer.error_bound(case.x))[inside].all())


@law
@given(ALL)
def test_error_bound_is_not_idle(case: Case) -> None:
    half_step = case.step.double() / 2
    if isinstance(case.spec.scheme, Logarithmic):
        half_step = case.x.double().abs()
    if isinstance(case.spec.scheme, TwinUniform):
        half_step = half_step * (1 + 2**case.spec.scheme.shift)
    eps = torch.finfo(case.x.dtype).eps
    rounding = eps * (case.x.double().abs() + 2 * half_step)
    bound = case.quantizer.error_bound(case.x).double()
    assert bool((bound <= (half_step + rounding) * (1 + 1e-6)).all())


@law
@given(ALL)
def test_range_is_where_codes_saturate(case: Case) -> None:
    low, high = case.quantizer.range()
    low, high = (along_axis(end, case.spec.granularity, case.x.ndim) for end in (low, high))
    y = case.quantizer(case.x.float())
    assert bool(((y >= low) & (y <= high)).all())
    assert same_bits(case.quantizer(torch.full_like(y, 1e35)), high.expand_as(y).contiguous())
    assert torch.equal(case.quantizer(torch.full_like(y, -1e35)), low.expand_as(y))


@law
@given(cases(st.integers(2, 16), EXACT_DTYPES))
def test_a_channel_is_quantized_as_if_alone(case: Case) -> None:
    axis = channel_axis(case.spec.granularity)
    if axis is None or isinstance(case.spec.scheme, PowerOfTwoFactor):
        return
    y = case.quantizer(case.x)
    spec = replace(case.spec, granularity=PerTensor())
    for i in range(SHAPE[axis]):
        zero = None if case.quantizer.zero_point is None else case.quantizer.zero_point[i]
        alone = build_quantizer(spec, QParams(case.quantizer.scale[i], zero))
        assert same_bits(y.select(axis, i).contiguous(), alone(case.x.select(axis, i)))


def test_halves_go_to_the_even_level() -> None:
    quantizer = build_quantizer(QuantSpec(8), QParams(torch.tensor(2.0), torch.tensor(7)))
    x = torch.tensor([-5.0, -3.0, -1.0, 1.0, 3.0, 5.0])
    assert quantizer.encode(x).tolist() == [5, 5, 7, 7, 9, 9]


def test_per_head_means_axis_minus_three() -> None:
    spec = QuantSpec(8, signed=True, symmetric=True, granularity=PerHead())
    quantizer = build_quantizer(spec, QParams(torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3, dtype=torch.int32)))
    x = torch.full((2, 6, 3, 5, 5), 2.9)
    expected = torch.tensor([3.0, 2.0, 4.0])  # 2.9 is 1.45 steps of 2 and 0.725 steps of 4
    assert torch.equal(quantizer(x), expected.view(3, 1, 1).expand_as(x))
    assert torch.equal(quantizer(x[0]), expected.view(3, 1, 1).expand_as(x[0]))


def test_bfloat16_results_of_wide_codes_do_not_encode_to_themselves() -> None:
    """The limit stated in `Quantizer`: rounding 193 levels to 8 significant bits moves it to another level."""
    quantizer = build_quantizer(QuantSpec(8), QParams(torch.tensor(1.9), torch.tensor(0)))
    codes = torch.arange(256).to(torch.uint8)
    again = quantizer.encode(quantizer.decode(codes, torch.bfloat16))
    assert torch.equal(again[:129], codes[:129])
    assert not torch.equal(again, codes)


@law
@given(ALL)
def test_state_survives(case: Case) -> None:
    model = nn.Sequential(case.quantizer, nn.Linear(2, 2))
    expected = case.quantizer(case.x)
    state = {name: value.clone() for name, value in case.quantizer.state_dict().items()}
    for convert in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to(torch.float16)):
        convert(model)
        assert model[1].weight.dtype != torch.float32
        assert same_bits(case.quantizer(case.x), expected)
    for name, value in case.quantizer.state_dict().items():
        assert value.dtype == state[name].dtype
        assert torch.equal(value, state[name])
    assert same_bits(copy.deepcopy(case.quantizer)(case.x), expected)
    blank = QParams(
        torch.ones_like(case.quantizer.scale),
        None if case.quantizer.zero_point is None else torch.zeros_like(case.quantizer.zero_point),
        None if case.quantizer.factor is None else torch.zeros_like(case.quantizer.factor),
    )
    loaded = build_quantizer(case.spec, blank)
    loaded.load_state_dict(state)
    assert same_bits(loaded(case.x), expected)


def test_quantizer_shares_no_memory_with_its_parameters() -> None:
    params = QParams(torch.tensor(0.5), torch.tensor(0, dtype=torch.int32))
    quantizer = build_quantizer(QuantSpec(8, signed=True), params)
    params.scale.fill_(7.0)
    assert float(quantizer.scale) == 0.5


def test_moving_to_a_device_keeps_dtypes() -> None:
    quantizer = build_quantizer(QuantSpec(8), QParams(torch.tensor(0.5), torch.tensor(3)))
    moved = quantizer.to("meta", torch.float16)
    assert moved.scale.device.type == "meta"
    assert (moved.scale.dtype, moved.zero_point.dtype) == (torch.float32, torch.int32)  # type: ignore[union-attr]


@pytest.mark.parametrize("scheme", [Uniform(), Uniform(clamp_before_round=True), PowerOfTwoScale()])
def test_gradient_is_one_inside_and_zero_outside(scheme: Scheme) -> None:
    quantizer = build_quantizer(QuantSpec(4, scheme=scheme), QParams(torch.tensor(0.5), torch.tensor(5)))
    x = torch.tensor([-9.0, -3.01, -2.4, -0.2, 0.0, 0.3, 4.9, 5.9, 90.0], requires_grad=True)  # range [-2.5, 5]
    quantizer(x).backward(torch.full_like(x, 3.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 3, 3, 3, 3, 3, 0, 0]


def test_gradients_of_twin_steps() -> None:
    """Range [-4, 15.5]: to x 1 inside and 0 outside; to the scale the level minus x / scale inside, else the level."""
    quantizer = build_quantizer(QuantSpec(4, scheme=TwinUniform(2)), QParams(torch.tensor(0.5), torch.tensor(5)))
    scale = nn.Parameter(quantizer.scale.clone())
    del quantizer.scale
    quantizer.scale = scale
    x = torch.tensor([-9.0, -4.3, -3.9, -0.6, 0.0, 1.4, 2.9, 15.7, 16.0, 90.0], requires_grad=True)
    y = quantizer(x)
    levels = [-8, -8, -8, -1, 0, 3, 7, 31, 31, 31]
    assert y.tolist() == [0.5 * level for level in levels]
    slopes = []
    for each in y:
        scale.grad = None
        each.backward(retain_graph=True)
        assert scale.grad is not None
        slopes.append(float(scale.grad))
    assert x.grad is not None
    inside = [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert x.grad.tolist() == inside
    expected = [level - each * 2 * within for level, each, within in zip(levels, x.tolist(), inside, strict=True)]
    assert slopes == pytest.approx(expected, abs=1e-5)


def test_clamp_order_decides_the_gradient_within_half_a_step_of_the_ends() -> None:
    for clamp_first, expected in ((True, [0.0, 0.0]), (False, [1.0, 1.0])):
        spec = QuantSpec(4, scheme=Uniform(clamp_before_round=clamp_first))
        quantizer = build_quantizer(spec, QParams(torch.tensor(0.5), torch.tensor(5)))
        x = torch.tensor([-2.6, 5.2], requires_grad=True)
        y = quantizer(x)
        assert y.tolist() == [-2.5, 5.0]
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == expected


@law
@given(st.integers(2, 8), st.booleans(), st.integers(0, 2**31))
def test_scale_gradient_is_that_of_lsq(bits: int, signed: bool, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    spec = QuantSpec(bits, signed, True, PerHead(), Uniform(clamp_before_round=True))
    quantizer = build_quantizer(spec, params_for(spec, random))
    x = operand(quantizer, random).float().clamp(-1e4, 1e4)
    scale = nn.Parameter(quantizer.scale.clone())
    del quantizer.scale
    quantizer.scale = scale
    upstream = torch.randn(SHAPE, generator=random)
    quantizer(x).backward(upstream)

    step, zero = scale.detach().double().view(3, 1, 1), 0 if signed else 1 << (bits - 1)
    ratio = (x / scale.detach().view(3, 1, 1)).double()
    low, high = spec.qmin - zero, spec.qmax - zero
    inside = (ratio >= low) & (ratio <= high)
    slope = torch.where(inside, ratio.round() - x.double() / step, ratio.clamp(low, high))
    expected = (slope * upstream).sum((0, 2, 3))
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad.double(), expected, rtol=1e-4, atol=1e-4 * (1 << bits))
    quantizer.half()
    assert isinstance(quantizer.scale, nn.Parameter)
    assert quantizer.scale.dtype == torch.float32


def test_log2_gradient_is_zero_where_saturated_or_zero() -> None:
    quantizer = build_quantizer(QuantSpec(3, scheme=Log2()), QParams(torch.tensor(0.5)))
    x = torch.tensor([-1.0, 0.0, 0.5 * 2**-6.6, 0.5 * 2**-6.4, 0.3, 0.5, 0.51], requires_grad=True)
    y = quantizer(x)
    assert y.tolist() == [0, 0, 0, 0.5 * 2**-6, 0.25, 0.5, 0.5]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 0, 1, 1, 1, 0]


def test_log_sqrt2_gradient_is_zero_where_saturated_or_zero() -> None:
    quantizer = build_quantizer(QuantSpec(3, scheme=LogSqrt2()), QParams(torch.tensor(0.5)))
    x = torch.tensor([-1.0, 0.0, 0.5 * 2**-3.3, 0.5 * 2**-3.2, 0.35, 0.5, 0.51], requires_grad=True)
    y = quantizer(x)
    assert y.tolist() == [0, 0, 0, 0.5 * 2**-3, torch.tensor(math.sqrt(0.5)) / 2, 0.5, 0.5]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scheme", POWERS)
def test_powers_are_exact(scheme: Scheme, bits: int) -> None:
    """Levels are the powers rounded once, of either dtype."""
    spec = QuantSpec(bits, scheme=scheme)
    quantizer = build_quantizer(spec, QParams(torch.tensor(1.0)))
    codes = torch.arange(min(largest_code(quantizer), 127 * steps_of(spec)))
    for dtype in EXACT_DTYPES:
        x = torch.tensor([math.sqrt(0.25 ** (int(k) / steps_of(spec))) for k in codes], dtype=torch.float64).to(dtype)
        assert torch.equal(quantizer.encode(x).long(), codes)
        assert torch.equal(quantizer.decode(codes, dtype), x)
        assert same_bits(quantizer(x), x)


@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize("scheme", POWERS)
def test_codes_change_at_the_first_number_above_the_real_threshold(scheme: Scheme, dtype: torch.dtype) -> None:
    """Fourth powers of floats are compared with powers of two as fractions: nothing is rounded."""
    quantizer = build_quantizer(QuantSpec(5, scheme=scheme), QParams(torch.tensor(1.0)))
    steps = steps_of(quantizer.spec)
    for code in range(largest_code(quantizer)):
        x = torch.tensor(threshold(code, steps, dtype), dtype=dtype)
        assert x.item() == threshold(code, steps, dtype)
        below = torch.nextafter(x, torch.tensor(0.0, dtype=dtype))
        real = Fraction(1, 2 ** ((2 * code + 1) * 2 // steps))
        assert Fraction(below.item()) ** 4 < real < Fraction(x.item()) ** 4
        assert quantizer.encode(torch.stack([x, below])).tolist() == [code, code + 1]


@pytest.mark.parametrize("bits", [2, 4, 7])
@pytest.mark.parametrize("scheme", [Log2(separate_zero=True), LogSqrt2(separate_zero=True)])
def test_a_separate_zero_leaves_all_codes_to_powers(scheme: Scheme, bits: int) -> None:
    quantizer = build_quantizer(QuantSpec(bits, scheme=scheme), QParams(torch.tensor(1.0)))
    last, steps = 2**bits - 1, steps_of(quantizer.spec)
    x = torch.tensor([2.0 ** (-k / steps) for k in (0, last, last + 0.49, last + 0.51, math.inf)])
    assert quantizer.encode(x).tolist() == [0, last, last, last + 1, last + 1]
    assert torch.equal(quantizer(x), torch.stack([x[0], x[1], x[1], x[4], x[4]]))
    assert quantizer.encode(-x).tolist() == [last + 1] * 5


def test_nan_stays_nan() -> None:
    for scheme in (Uniform(), Log2(), LogSqrt2()):
        zero = None if isinstance(scheme, Logarithmic) else torch.tensor(0)
        quantizer = build_quantizer(QuantSpec(8, scheme=scheme), QParams(torch.tensor(0.5), zero))
        assert bool(quantizer(torch.tensor([torch.nan])).isnan().all())

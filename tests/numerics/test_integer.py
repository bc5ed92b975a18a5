"""Every integer function against exact integers, fractions or float64, over its whole domain."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitquant.integer.activation import look_up
from vitquant.integer.arithmetic import bit_length, logarithm, rescaling, shift_right, square_root
from vitquant.integer.exponential import Exponential, exact_exponential, polynomial_exponential
from vitquant.integer.layer_norm import (
    LayerNorm,
    integer_epsilon,
    normalize,
    published_layer_norm,
)
from vitquant.integer.softmax import distances, integer_softmax, log_int_softmax, published_log_int_softmax, row_sums

law = settings(max_examples=150, deadline=None)

ROOTS = st.integers(0, 2**31 - 1)
AROUND = st.integers(-1, 1)
LARGE = (
    st.integers(0, 2**62 - 1)
    | st.builds(lambda root, more: root * root + more, ROOTS, AROUND)
    | st.builds(lambda power, more: 2**power + more, st.integers(0, 61), AROUND)
).map(lambda x: min(max(x, 0), 2**62 - 1))


# Arithmetic


@law
@given(st.lists(LARGE, min_size=1, max_size=200))
def test_square_root_is_the_floor(values: list[int]) -> None:
    assert square_root(torch.tensor(values)).tolist() == [math.isqrt(x) for x in values]


def test_square_root_of_every_small_number_and_of_the_ends_of_its_range() -> None:
    values = [*range(2**14), *(2**62 - 1 - k for k in range(100)), (2**31 - 1) ** 2, (2**31 - 1) ** 2 - 1]
    assert square_root(torch.tensor(values)).tolist() == [math.isqrt(x) for x in values]


@law
@given(st.lists(LARGE | st.integers(0, 2**63 - 1), min_size=1, max_size=200))
def test_bit_length_counts_binary_digits(values: list[int]) -> None:
    assert bit_length(torch.tensor(values)).tolist() == [x.bit_length() for x in values]


@law
@given(st.lists(st.integers(1, 2**31 - 1) | st.integers(1, 300), min_size=1, max_size=200), st.integers(0, 14))
def test_logarithm_is_the_floor_or_one_less_just_above_an_integer(values: list[int], fraction_bits: int) -> None:
    exact = torch.tensor([math.log2(x) * 2**fraction_bits for x in values], dtype=torch.float64)
    short = torch.floor(exact) - logarithm(torch.tensor(values), fraction_bits)
    assert bool(((short == 0) | ((short == 1) & (exact - exact.floor() < 2**-15))).all())


@pytest.mark.parametrize("fraction_bits", [0, 1, 12, 14])
def test_logarithm_of_powers_of_two_is_exact(fraction_bits: int) -> None:
    powers = torch.tensor([2**k for k in range(31)])
    assert logarithm(powers, fraction_bits).tolist() == [k << fraction_bits for k in range(31)]


@law
@given(st.lists(st.integers(-(2**60), 2**60) | st.integers(-40, 40), min_size=1, max_size=100), st.integers(1, 60))
def test_shift_right_rounds_halves_up(values: list[int], digits: int) -> None:
    expected = [math.floor(Fraction(x, 2**digits) + Fraction(1, 2)) for x in values]
    assert shift_right(torch.tensor(values), digits).tolist() == expected


def test_shift_right_of_negative_halves() -> None:
    assert shift_right(torch.tensor([-3, -2, -1, 1, 2, 3]), 1).tolist() == [-1, -1, 0, 1, 1, 2]


MANTISSAS = st.floats(0.5, 1.0, exclude_max=True)


@st.composite
def channels(draw: st.DrawFn, deepest: int) -> tuple[list[float], list[float], int]:
    """Ratios, the largest at least 2**exponent / 2 and the others up to 2**deepest below; offsets; the exponent."""
    exponent = draw(st.integers(-50, 24))
    ratios = [draw(MANTISSAS)]
    for _ in range(draw(st.integers(0, 5))):
        ratio = draw(MANTISSAS) * 2.0 ** -draw(st.integers(0, deepest))
        ratios.append(draw(st.sampled_from([ratio, -ratio, 0.0])))
    ratios = [math.ldexp(ratio, exponent) for ratio in ratios]
    offsets = [draw(st.floats(-1.0, 1.0)) * 2.0 ** draw(st.integers(-20, 40)) for _ in ratios]
    return ratios, offsets, exponent


@law
@given(channels(deepest=40), st.lists(st.integers(-(2**31), 2**31), min_size=1, max_size=20))
def test_rescaling_errs_by_half_a_unit_and_the_multiplier_s_last_digit(
    given_channels: tuple[list[float], list[float], int], values: list[int]
) -> None:
    ratios, offsets, exponent = given_channels
    made = rescaling(torch.tensor(ratios, dtype=torch.float64), torch.tensor(offsets, dtype=torch.float64))
    assert -(2**31) <= int(made.multiplier.min()) <= int(made.multiplier.max()) < 2**31
    if max(map(abs, offsets)) <= 2.0 ** (28 + exponent):
        assert made.shift == min(31 - exponent, 60)  # nothing but the largest ratio decides
    found = made.apply(torch.tensor(values)[:, None], -(2**62), 2**62)
    # A multiplier that rounds to 2**31 is one less: its last digit counts whole, that of the others half.
    halves = [2 if multiplier == 2**31 - 1 else 1 for multiplier in made.multiplier.tolist()]
    for x, row in zip(values, found.tolist(), strict=True):
        for ratio, offset, half, y in zip(ratios, offsets, halves, row, strict=True):
            error = abs(y - Fraction(ratio) * x - Fraction(offset))
            assert error <= Fraction(1, 2) + Fraction(half * abs(x) + 1, 2 ** (made.shift + 1))


@law
@given(channels(deepest=10), st.integers(-256, 256))
def test_rescaling_to_eight_bits_errs_by_half_a_unit_and_2_to_the_minus_12(
    given_channels: tuple[list[float], list[float], int], target: int
) -> None:
    """For channels within 2**11 of the largest ratio; the addend adds its own last digit."""
    ratios, offsets, _ = given_channels
    offsets = [math.fmod(offset, 256.0) for offset in offsets]
    made = rescaling(torch.tensor(ratios, dtype=torch.float64), torch.tensor(offsets, dtype=torch.float64))
    for channel, (ratio, offset) in enumerate(zip(ratios, offsets, strict=True)):
        x = 0 if ratio == 0 else round(target / ratio)
        if abs(x) < 2**31:
            y = int(made.apply(torch.tensor(x), -(2**40), 2**40)[channel])
            bound = Fraction(1, 2) + Fraction(1, 2**12) + Fraction(1, 2 ** (made.shift + 1))
            assert abs(y - Fraction(ratio) * x - Fraction(offset)) <= bound


@law
@given(channels(deepest=16), st.integers(-256, 256))
def test_rescaling_of_channels_2_to_the_16_below_the_largest_errs_by_half_a_unit_and_2_to_the_minus_7(
    given_channels: tuple[list[float], list[float], int], target: int
) -> None:
    """Such a channel keeps 14 binary digits of its ratio: half of the last one, 256 times."""
    ratios, offsets, exponent = given_channels
    offsets = [math.fmod(offset, min(256.0, 2.0 ** (28 + exponent))) for offset in offsets]
    made = rescaling(torch.tensor(ratios, dtype=torch.float64), torch.tensor(offsets, dtype=torch.float64))
    for channel, (ratio, offset) in enumerate(zip(ratios, offsets, strict=True)):
        x = 0 if ratio == 0 else round(target / ratio)
        if abs(x) < 2**31:
            y = int(made.apply(torch.tensor(x), -(2**40), 2**40)[channel])
            bound = Fraction(1, 2) + Fraction(1, 2**7) + Fraction(1, 2 ** (made.shift - 1))
            assert abs(y - Fraction(ratio) * x - Fraction(offset)) <= bound


@pytest.mark.parametrize(("ratio", "multiplier"), [(1 - 2**-40, 2**31 - 1), (2**-40 - 1, -(2**31)), (0.5, 2**30)])
def test_rescaling_multipliers_have_31_bits_and_a_sign(ratio: float, multiplier: int) -> None:
    made = rescaling(torch.tensor(ratio, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    assert (made.multiplier.item(), made.shift) == (multiplier, 31)


def test_rescaling_of_nothing_but_zeros_gives_the_offsets() -> None:
    made = rescaling(torch.zeros(3, dtype=torch.float64), torch.tensor([-2.6, 0.5, 7.0], dtype=torch.float64))
    assert made.apply(torch.tensor([[5, -9, 2**31]]), -100, 100).tolist() == [[-3, 1, 7]]


def test_rescaling_clamps() -> None:
    made = rescaling(torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64))
    assert made.apply(torch.tensor([-300, -3, 0, 3, 300]), -2, 255).tolist() == [-2, -2, 0, 3, 255]


def test_look_up_counts_from_the_lowest_code() -> None:
    assert look_up(torch.tensor([[-2, 1], [0, -1]]), torch.tensor([10, 11, 12, 13]), -2).tolist() == [
        [10, 13],
        [12, 11],
    ]


# Exponential

SCALES = st.floats(math.log(1e-7), math.log(1e3)).map(math.exp)
LEVELS = st.sampled_from([4, 16, 128, 256])


def assert_well_formed(table: Exponential, levels: int) -> None:
    assert len(table.values) == len(table.octaves) == levels + 1
    assert table.masked == levels
    assert (table.values[-1], table.octaves[-1]) == (0, 2**18 - 1)
    assert (table.values[0], table.octaves[0]) == (2**15, 0)
    for entries, bits in ((table.values, 16), (table.octaves, 18)):
        assert entries.dtype == torch.int64
        assert int(entries.min()) >= 0
        assert int(entries.max()) < 2**bits


@law
@given(SCALES, LEVELS)
def test_exact_exponential_is_rounded_once(scale: float, levels: int) -> None:
    table = exact_exponential(scale, levels)
    assert_well_formed(table, levels)
    for distance, (value, octaves) in enumerate(zip(table.values.tolist(), table.octaves.tolist(), strict=True)):
        if distance < levels:
            assert abs(value - 2**15 * math.exp(-scale * distance)) <= 0.5 + 1e-6
            assert abs(octaves - min(2**18 - 1, 2**12 * scale * distance / math.log(2))) <= 0.5 + 1e-6


def published_exponential(scale: float, distance: int) -> Fraction:
    """exp(-scale * distance) by methods.md 3.5, in Python integers, as a fraction of exp(0)."""
    a, b, c, n = 0.35815147, 0.96963238, 1.0, 30
    b_i, c_i, x_0 = math.floor(b / a / scale), math.floor(c / a / scale**2), math.floor(-0.6931 / scale)
    x = max(-distance, n * x_0)
    q = x // x_0
    r = x - q * x_0
    return Fraction(r * (r + b_i) + c_i, c_i * 2**q)


# Where one of the polynomial's integer constants goes from one integer to the next.
STEPS_OF_CONSTANTS = st.builds(
    lambda constant, integer, side: (constant / integer) * (1 + side * 1e-9),
    st.sampled_from([0.6931, 0.96963238 / 0.35815147]),
    st.integers(2, 40),
    st.sampled_from([-1, 1]),
)


@law
@given(st.floats(math.log(1e-5), math.log(1.6)).map(math.exp) | STEPS_OF_CONSTANTS, LEVELS)
def test_polynomial_exponential_is_the_published_one(scale: float, levels: int) -> None:
    table = polynomial_exponential(scale, levels)
    assert_well_formed(table, levels)
    for distance in range(levels):
        exact = published_exponential(scale, distance)
        assert abs(int(table.values[distance]) - 2**15 * exact) <= Fraction(1, 2) + Fraction(1, 10**6)
        octaves = min(2**18 - 1, -(2**12) * math.log2(exact))
        assert abs(int(table.octaves[distance]) - octaves) <= 0.5 + 1e-6


def test_polynomial_exponential_is_close_to_the_exact_one_at_small_scales() -> None:
    for scale in (0.001, 0.01, 0.03):
        exact, published = exact_exponential(scale), polynomial_exponential(scale)
        assert 0 < (exact.values - published.values).abs().max() < 2**15 * 0.02


@law
@given(SCALES, LEVELS)
def test_polynomial_exponential_is_a_table_at_every_scale(scale: float, levels: int) -> None:
    assert_well_formed(polynomial_exponential(scale, levels), levels)


# Softmax


@st.composite
def rows(draw: st.DrawFn, longest: int = 300) -> tuple[Tensor, float]:
    """Scores (3, row) of 8 bits, spread widely or narrowly, with equal and extreme ones; and their scale."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    length, spread = draw(st.integers(1, longest)), draw(st.sampled_from([0, 2, 20, 100, 400]))
    codes = (torch.randn(3, length, generator=random) * spread + draw(st.integers(0, 255))).round().long()
    return codes.clamp(0, 255) - draw(st.sampled_from([0, 128])), draw(st.floats(math.log(3e-3), 0.0).map(math.exp))


def probabilities(codes: Tensor, scale: float) -> Tensor:
    return torch.softmax(codes.double() * scale, -1)


def sum_error(length: int) -> float:
    """How far the sum of a row's exponentials can be off, relative to it: half a unit for each but the largest."""
    return (length - 1) / 2 / 2**15


@law
@given(rows(), st.sampled_from(["exact", "polynomial"]))
def test_distances_are_those_from_the_largest_visible_score(given_rows: tuple[Tensor, float], kind: str) -> None:
    codes, scale = given_rows
    table = exact_exponential(scale) if kind == "exact" else polynomial_exponential(scale)
    assert torch.equal(distances(codes, None, table), codes.max(-1, keepdim=True).values - codes)
    hidden = torch.zeros_like(codes, dtype=torch.bool)
    hidden[:, ::2] = codes.shape[-1] > 1
    found = distances(codes, hidden, table)
    assert bool((found[hidden] == table.masked).all())
    assert torch.equal(
        found[:, 1::2], distances(codes[:, 1::2], None, table) if codes.shape[-1] > 1 else found[:, 1::2]
    )


FIRST_POWERS = st.just(1.0) | st.floats(2**-20, 4.0)  # scales of the result
STEPS_AND_ZERO = st.sampled_from([(1, 3), (1, 7), (1, 15), (1, 16), (2, 7), (2, 15), (2, 16), (2, 31), (2, 32)])


def offset_of(first: float) -> int:
    return round(math.log2(first) * 2**12)


def off_by(first: float) -> float:
    """How far, in octaves, a boundary is off: half a unit of octaves, one of the sum's, half a one of the offset's."""
    return 2**-11 if first == 1 else 5 * 2**-13


@law
@given(rows(), STEPS_AND_ZERO, FIRST_POWERS)
def test_log_int_softmax_rounds_the_logarithm_of_the_tables_quotient(
    given_rows: tuple[Tensor, float], form: tuple[int, int], first: float
) -> None:
    """Near a boundary between two powers it may take either."""
    (codes, scale), (steps, zero) = given_rows, form
    table = exact_exponential(scale)
    distance = distances(codes, None, table)
    total = row_sums(distance, table).double().log2() - 15
    exponent = steps * (distance * scale / math.log(2) + total + math.log2(first))
    found = log_int_softmax(distance, table, zero, steps, offset_of(first))
    assert_nearest(found, exponent, zero, steps * off_by(first))


@law
@given(rows(), STEPS_AND_ZERO, FIRST_POWERS)
def test_log_int_softmax_is_the_rounded_logarithm_of_softmax(
    given_rows: tuple[Tensor, float], form: tuple[int, int], first: float
) -> None:
    """The row's sum moves the boundary by as much as rounding its exponentials moves the sum."""
    (codes, scale), (steps, zero) = given_rows, form
    exponent = -steps * torch.log2(probabilities(codes, scale).clamp(min=1e-300) / first)
    table = exact_exponential(scale)
    found = log_int_softmax(distances(codes, None, table), table, zero, steps, offset_of(first))
    margin = off_by(first) + math.log2(1 + sum_error(codes.shape[-1]))
    assert_nearest(found, exponent, zero, steps * margin)


@law
@given(rows(40), st.floats(2**-32, 2**32), st.sampled_from([(1, 16), (2, 32)]))
def test_hidden_entries_are_zero_whatever_the_first_power(
    given_rows: tuple[Tensor, float], first: float, form: tuple[int, int]
) -> None:
    (codes, scale), (steps, zero) = given_rows, form
    table, hidden = exact_exponential(scale), torch.arange(codes.shape[-1]) % 2 == 0
    found = log_int_softmax(distances(codes, hidden, table), table, zero, steps, offset_of(first))
    assert bool((found[:, hidden] == zero).all())


def assert_nearest(found: Tensor, exponent: Tensor, zero: int, margin: float) -> None:
    lowest, highest = torch.floor(exponent + 0.5 - margin), torch.floor(exponent + 0.5 + margin)
    assert bool((found >= lowest.clamp(0, zero)).all())
    assert bool((found <= highest.clamp(0, zero)).all())


def test_log_int_softmax_of_every_distance_at_many_scales() -> None:
    for scale in torch.linspace(0.001, 0.3, 300, dtype=torch.float64).tolist():
        table, distance = exact_exponential(scale), torch.arange(256)
        total = row_sums(distance, table).double().log2() - 15
        assert_nearest(log_int_softmax(distance, table, 15), distance * scale / math.log(2) + total, 15, 1.5 * 2**-12)


def test_log_int_softmax_by_hand() -> None:
    table = exact_exponential(math.log(2))  # each step halves
    distance = distances(torch.tensor([[7, 7, 0, 0], [40, 20, 26, 27]]), None, table)
    assert log_int_softmax(distance, table, 15).tolist() == [[1, 1, 8, 8], [0, 15, 14, 13]]
    assert log_int_softmax(distance, table, 31, 2).tolist() == [[2, 2, 16, 16], [0, 31, 28, 26]]
    assert log_int_softmax(distance, table, 31, 2, -2 << 12).tolist() == [[0, 0, 12, 12], [0, 31, 24, 22]]
    assert log_int_softmax(distance, table, 15, 1, 1 << 12).tolist() == [[2, 2, 9, 9], [1, 15, 15, 14]]


FORMS = [
    (lambda distance, table: log_int_softmax(distance, table, 15), 15),
    (lambda distance, table: log_int_softmax(distance, table, 16), 16),
    (lambda distance, table: log_int_softmax(distance, table, 31, 2, -7777), 31),
    (lambda distance, table: published_log_int_softmax(distance, table, 16), 16),
    (lambda distance, table: integer_softmax(distance, table, 255 << 22, 22), 0),
]


@pytest.mark.parametrize(("softmax", "zero"), FORMS)
@settings(max_examples=20, deadline=None)
@given(given_rows=rows(100), seed=st.integers(0, 2**31))
def test_hidden_entries_are_zero_and_change_nothing_else(softmax, zero, given_rows, seed) -> None:
    codes, scale = given_rows
    random = torch.Generator().manual_seed(seed)
    visible = torch.rand(codes.shape[-1], generator=random) < 0.5
    visible[torch.randint(codes.shape[-1], (1,), generator=random)] = True
    for table in (exact_exponential(scale), polynomial_exponential(scale)):
        found = softmax(distances(codes, ~visible, table), table)
        assert bool((found[:, ~visible] == zero).all())
        assert torch.equal(found[:, visible], softmax(distances(codes[:, visible], None, table), table))
        assert torch.equal(softmax(distances(codes + 40, ~visible, table), table), found)  # shifts cancel


@pytest.mark.parametrize(("softmax", "zero"), FORMS)
def test_a_row_that_is_hidden_whole_is_zero_and_the_next_row_is_not(softmax, zero) -> None:
    table = exact_exponential(0.05)
    codes, hidden = torch.tensor([[-128, 3, 127], [0, 0, 0]]), torch.tensor([[True], [False]])
    found = softmax(distances(codes, hidden, table), table)
    assert found[0].tolist() == [zero] * 3
    assert torch.equal(found[1:], softmax(distances(codes[1:], None, table), table))


def log_round(inverse: int) -> int:
    """FQ-ViT's rounding of log2: up from 1.5 * 2**k on (methods.md 3.5)."""
    k = inverse.bit_length() - 1
    return k + 1 if 2 * (inverse - 2**k) >= 2**k else k


@law
@given(rows(60), st.sampled_from([7, 15, 16]), st.sampled_from(["exact", "polynomial"]))
def test_published_log_int_softmax_is_that_of_python_integers(
    given_rows: tuple[Tensor, float], zero: int, kind: str
) -> None:
    codes, scale = given_rows
    table = exact_exponential(scale) if kind == "exact" else polynomial_exponential(scale)
    found = published_log_int_softmax(distances(codes, None, table), table, zero)
    for row, codes_found in zip(codes.tolist(), found.tolist(), strict=True):
        values = [int(table.values[max(row) - code]) for code in row]
        for value, code in zip(values, codes_found, strict=True):
            expected = zero if value == 0 else log_round(math.floor(Fraction(sum(values), value) + Fraction(1, 2)))
            assert code == min(expected, zero)


def test_published_rounding_differs_from_the_nearest_power_between_the_two_means() -> None:
    """An inverse probability of 2.9 is 3 and so rounds up to 4; by its logarithm, 1.54, it does too; 5.7 does not."""
    assert [log_round(x) for x in (1, 2, 3, 4, 5, 6, 11, 12, 23, 24)] == [0, 1, 2, 2, 2, 3, 3, 4, 4, 5]


@law
@given(rows(), st.sampled_from([1 / 255, 1 / 15, 0.7 / 255, 1 / 65535]))
def test_integer_softmax_errs_by_half_a_step_and_the_rounding_of_the_exponentials(
    given_rows: tuple[Tensor, float], step: float
) -> None:
    """p = e / s: rounding e by half a unit and s by half a unit per entry moves p by (1 + p (length - 1)) / (2 s).

    The sum is at least 2**15 units. The reciprocal is rounded down at 2**-16 of a unit of multiplier / sum, and the
    multiplier at 2**-31: neither matters beside them.
    """
    codes, scale = given_rows
    length = codes.shape[-1]
    made = rescaling(torch.tensor(1 / step, dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    table = exact_exponential(scale)
    distance = distances(codes, None, table)
    found = integer_softmax(distance, table, int(made.multiplier), made.shift)
    exact = probabilities(codes, scale)
    bound = 0.5 + (1 + exact * (length - 1)) / (2 * row_sums(distance, table)) / step + 2**-12
    assert bool(((found - exact / step).abs() <= bound).all())


@law
@given(rows(), st.sampled_from([(1 << 30, 30), (255 << 23, 23), (10**7 << 7, 7), (65535 << 15, 15)]))
def test_integer_softmax_is_the_rounded_quotient_of_the_table_s_integers(
    given_rows: tuple[Tensor, float], steps: tuple[int, int]
) -> None:
    """The reciprocal is rounded down once, at 2**-16: that is the value times 2**-(shift + 16) at most."""
    codes, scale = given_rows
    multiplier, shift = steps
    table = exact_exponential(scale)
    for row, found in zip(codes.tolist(), codes, strict=True):
        distance = distances(found[None], None, table)
        values = [int(table.values[max(row) - code]) for code in row]
        for value, y in zip(values, integer_softmax(distance, table, multiplier, shift)[0].tolist(), strict=True):
            error = y - Fraction(value * multiplier, sum(values) << shift)
            assert -Fraction(1, 2) - Fraction(value, 2 ** (shift + 16)) <= error <= Fraction(1, 2)


def test_integer_softmax_of_a_row_of_small_exponentials_is_off_by_most_of_a_step() -> None:
    """196 entries of 0.49 units round to nothing: the largest should be 254.24 and is 255."""
    table = exact_exponential(11.1103)
    codes = torch.tensor([[1] + [0] * 196])
    found = integer_softmax(distances(codes, None, table), table, 255 << 22, 22)
    assert probabilities(codes, 11.1103)[0, 0] * 255 < 254.27
    assert found[0].tolist() == [255] + [0] * 196


# LayerNorm

SHAPES = st.sampled_from([(1, 9), (2, 1), (3, 2**15), (7, 255), (48, 2040), (192, 2040), (768, 255), (3072, 2040)])


@st.composite
def integer_rows(draw: st.DrawFn, shapes: st.SearchStrategy = SHAPES) -> tuple[Tensor, int]:
    """Rows (8, channels): noise, constant rows, single spikes, the two extremes, slopes; and the bound on |x|."""
    (count, largest), seed = draw(shapes), draw(st.integers(0, 2**31))
    random = torch.Generator().manual_seed(seed)
    x = torch.zeros(8, count, dtype=torch.int64)
    x[0] = torch.randint(-largest, largest + 1, (count,), generator=random)
    x[1] = (torch.randn(count, generator=random) * draw(st.sampled_from([1, 5, largest / 4]))).round().long()
    x[2] = draw(st.integers(-largest, largest))
    x[3, draw(st.integers(0, count - 1))] = draw(st.sampled_from([1, -1, largest, -largest]))
    x[4] = largest * (-1) ** torch.arange(count)
    x[5] = largest
    x[5, -1] = largest - 1
    x[6] = torch.arange(count) % (largest + 1)
    x[7] = x[1] + draw(st.integers(-largest, largest))
    return x.clamp(-largest, largest), largest


def normalized(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Normalized values, and the channels times the deviation, from exact integer sums."""
    count, total = x.shape[-1], x.sum(-1, keepdim=True)
    spread = count * (x * x).sum(-1, keepdim=True) - total * total
    deviation = (spread.double() + epsilon).sqrt()
    return (count * x - total).double() / deviation, deviation


def root_error(count: int, largest: int, deviation: Tensor) -> Tensor:
    """How far, relatively, rounding channels * deviation down at 2**-guard and its reciprocal at 2**-50 can be off.

    The guard digits are those that 62 bits leave for the root's argument, 12 at most.
    """
    guard = max(0, min(12, (62 - ((count * largest) ** 2 + 2**40).bit_length()) // 2))
    return 2.0**-guard / deviation + deviation * 2.0**-50


EPSILONS = st.sampled_from([1, 2, 1000, 2**20, 2**40])


@law
@given(integer_rows() | integer_rows(st.just((4096, 2**15))), EPSILONS)
def test_normalize_errs_by_its_rounding_its_root_and_its_reciprocal(
    given_rows: tuple[Tensor, int], epsilon: int
) -> None:
    x, largest = given_rows
    exact, deviation = normalized(x, epsilon)
    bound = 2**-17 + exact.abs() * root_error(x.shape[-1], largest, deviation) + 1e-9
    found = normalize(x, epsilon, largest)
    assert bool(((found.double() / 2**16 - exact).abs() <= bound).all())
    assert int(found.abs().max()) <= math.sqrt(x.shape[-1]) * 2**16 * 1.5


WIDE = st.sampled_from([(48, 65535), (768, 2**15), (768, 65535), (1536, 2**15), (1536, 65535)])


@settings(max_examples=60, deadline=None)
@given(integer_rows(WIDE), EPSILONS)
def test_normalize_of_codes_of_16_bits_keeps_its_bound(given_rows: tuple[Tensor, int], epsilon: int) -> None:
    """Residual streams of u16 and s16, which leave no more than a digit or two behind the root's point."""
    x, largest = given_rows
    exact, deviation = normalized(x, epsilon)
    bound = 2**-17 + exact.abs() * root_error(x.shape[-1], largest, deviation) + 1e-9
    assert bool(((normalize(x, epsilon, largest).double() / 2**16 - exact).abs() <= bound).all())
    assert not normalize(x[2:3], epsilon, largest).any()  # the constant row


@law
@given(st.integers(0, 255), st.integers(-128, 127), st.integers(1, 300), st.integers(0, 2**31))
def test_a_table_of_an_activation_is_read_at_every_code(levels: int, lowest: int, count: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    table = torch.randint(-(2**15), 2**15, (levels + 1,), generator=random)
    codes = torch.randint(lowest, lowest + levels + 1, (count,), generator=random)
    codes[0], codes[-1] = lowest, lowest + levels
    assert look_up(codes, table, lowest).tolist() == [table.tolist()[code - lowest] for code in codes.tolist()]


@pytest.mark.parametrize(("count", "largest"), [(1, 1), (192, 2040), (4096, 2**15), (32, 2**15)])
def test_normalize_of_constant_rows_is_zero(count: int, largest: int) -> None:
    x = torch.tensor([[largest], [-largest], [0], [1]]).expand(-1, count)
    assert not normalize(x, 1, largest).any()


@pytest.mark.parametrize("count", [2, 192, 4096])
def test_normalize_of_the_largest_spike(count: int) -> None:
    x = torch.zeros(count, dtype=torch.int64)
    x[0] = 2**15
    expected = torch.full((count,), -1 / math.sqrt(count - 1), dtype=torch.float64)
    expected[0] = math.sqrt(count - 1)
    error = (normalize(x, 1, 2**15).double() / 2**16 - expected).abs()
    assert bool((error <= 1e-5 * expected.abs() + 2**-17).all())


@law
@given(st.sampled_from([1e-12, 1e-6, 1e-5]), SCALES, st.sampled_from([1, 16, 192, 3072]))
def test_integer_epsilon_is_the_nearest_and_at_least_1(epsilon: float, scale: float, count: int) -> None:
    exact = epsilon * count**2 / scale**2
    found = integer_epsilon(epsilon, scale, count)
    assert found >= 1
    if 1 <= exact <= 2**40:
        assert abs(found - exact) <= 0.5 + 1e-9 * exact


@law
@given(integer_rows(), st.floats(math.log(1e-4), math.log(10.0)).map(math.exp), st.integers(0, 2**31))
def test_layer_norm_is_that_of_float64_rounded_once(given_rows: tuple[Tensor, int], scale: float, seed: int) -> None:
    """Apart from the errors of `normalize` and of the rescaling, which move the boundary between two codes."""
    x, largest = given_rows
    count, random = x.shape[-1], torch.Generator().manual_seed(seed)
    gain = torch.randn(count, generator=random, dtype=torch.float64)
    gain[torch.rand(count, generator=random) < 0.1] = 0.0
    bias = torch.randn(count, generator=random, dtype=torch.float64)
    step, zero_point = 0.03, 117
    epsilon = integer_epsilon(1e-5, scale, count)
    affine = rescaling(gain / step / 2**16, bias / step + zero_point)
    found = LayerNorm(epsilon, largest, affine, 0, 255).apply(x)
    exact, deviation = normalized(x, epsilon)
    real = exact * gain / step + bias / step + zero_point
    margin = (2**-17 + exact.abs() * root_error(count, largest, deviation)) * gain.abs() / step
    margin = margin + exact.abs() * 2.0 ** (16 - affine.shift) + 2.0 ** -(affine.shift + 1) + 1e-9
    assert bool((found >= torch.floor(real + 0.5 - margin).clamp(0, 255)).all())
    assert bool((found <= torch.floor(real + 0.5 + margin).clamp(0, 255)).all())
    assert float(margin.median()) < 0.1  # nearly always the code is determined


def test_layer_norm_on_real_numbers_is_torch_s() -> None:
    """The units of epsilon, scale and bias: codes against torch's float64 LayerNorm of the values."""
    random = torch.Generator().manual_seed(0)
    x, scale, count = torch.randint(-300, 300, (64, 48), generator=random), 0.004, 48
    gain, bias = torch.rand(2, count, generator=random, dtype=torch.float64)
    for epsilon in (1e-6, 1e-2, 1.0):
        expected = torch.nn.functional.layer_norm(x * torch.tensor(scale).double(), (count,), gain, bias, epsilon)
        affine = rescaling(gain / 0.01 / 2**16, bias / 0.01)
        found = LayerNorm(integer_epsilon(epsilon, scale, count), 300, affine, -1000, 1000).apply(x)
        assert (found - expected / 0.01).abs().max() < 0.52


def test_layer_norm_of_inputs_smaller_than_epsilon_is_torch_s() -> None:
    """There epsilon is all there is in the denominator."""
    x, count = torch.tensor([[-1000, 1000] * 96]), 192
    scale = 1e-8
    expected = torch.nn.functional.layer_norm(x.double() * scale, (count,), eps=1e-5)
    found = normalize(x, integer_epsilon(1e-5, scale, count), 2040).double() / 2**16
    assert (found - expected).abs().max() < 2**-16


def published_by_hand(
    x: list[int], gain: list[float], bias: list[float], scale: float, output_scale: float
) -> list[int]:
    """Methods.md 3.4, element by element in Python's floats: for a row of X, s1, gamma, beta and s_o."""
    count = len(x)
    mean = sum(x) / count * scale
    std = scale / count * math.sqrt(count * sum(value * value for value in x) - sum(x) ** 2)
    found = []
    for value, gamma, beta in zip(x, gain, bias, strict=True):
        slope = scale / std * gamma / output_scale
        n = 31 if slope == 0 else min(max(7 - math.floor(math.log2(abs(slope))), 0), 31)
        m = min(max(math.floor(abs(slope) * 2**n), 0), 255)
        b = round((beta - mean / std * gamma) / output_scale * 2**n)
        found.append(round((math.copysign(1, slope) * m * value + b) / 2**n))
    return found


@law
@given(st.integers(0, 2**31), st.sampled_from([2, 17, 48]), st.sampled_from([1e-3, 0.05]), st.booleans())
def test_published_layer_norm_is_that_of_the_equations(seed: int, count: int, scale: float, zero_gain: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(-2040, 2040, (6, count), generator=random)
    x[:, 0] = 2040  # no constant row
    gain, bias = torch.randn(2, count, generator=random, dtype=torch.float64)
    if zero_gain:
        gain[:2] = torch.tensor([0.0, 1e-7])
    else:
        gain[:2] = torch.tensor([1e6, 1e-4])
    found = published_layer_norm(x, gain, bias, scale, torch.tensor(0.02, dtype=torch.float64))
    expected = [published_by_hand(row, gain.tolist(), bias.tolist(), scale, 0.02) for row in x.tolist()]
    assert found.tolist() == expected


def test_published_layer_norm_is_within_the_rounding_of_its_multipliers() -> None:
    """M has 8 bits and is rounded down: less than 1 / 128 of the product."""
    random = torch.Generator().manual_seed(0)
    x = torch.randint(-500, 500, (32, 48), generator=random)
    gain, bias = torch.rand(2, 48, generator=random, dtype=torch.float64) + 0.5
    expected = torch.nn.functional.layer_norm(x.double() * 0.01, (48,), gain, bias, 0.0) / 0.02
    found = published_layer_norm(x, gain, bias, 0.01, torch.tensor(0.02, dtype=torch.float64))
    deviation = x.double().std(-1, keepdim=True, correction=0)
    bound = x.abs() / deviation * gain / 0.02 / 128 + 1
    assert bool(((found - expected).abs() <= bound).all())


def test_published_layer_norm_of_constant_rows_and_zero_gains_is_finite() -> None:
    x = torch.tensor([[5] * 8, [0] * 8])
    found = published_layer_norm(x, torch.zeros(8).double(), torch.ones(8).double(), 0.1, torch.tensor(0.5).double())
    assert found.tolist() == [[2] * 8] * 2

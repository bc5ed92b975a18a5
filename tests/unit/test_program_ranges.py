"""The proof of ranges: what it must bound, what it must not believe, and what it once did."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import exp, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_programs import POWERS, TABLE, one, program

from vitquant.errors import LoweringError
from vitquant.integer.exponential import exact_exponential
from vitquant.lowering.scaled import Powers, numerators
from vitquant.program import instructions as p
from vitquant.program.checking import check_program
from vitquant.program.ranges import prove_ranges, prove_terms
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.products import exact_products


def softmax_row(values: torch.Tensor, octaves: torch.Tensor, powers: torch.Tensor, length: int, published: bool):
    """Probabilities of rows, times a register of 255."""
    steps = (
        p.SoftmaxToPowers("l", "softmax", "x", None, "values", "octaves", 15, 1, 0, published),
        p.Lookup("o", "softmax", "l", "powers", 0),
        p.Product("y", "context", "o", "v", 0, 0),
    )
    registers = {
        "x": p.Register("u8", (-1, 1, length)),
        "l": p.Register("u4", (-1, 1, length)),
        "y": p.Register("s64", (-1, 1, 1)),
        "o": p.Register("u16", (-1, 1, length)),
        "values": p.Register("u16", (len(values),)),
        "octaves": p.Register("s32", (len(octaves),)),
        "powers": p.Register("u16", (16,)),
        "v": p.Register("u8", (length, 1)),
    }
    constants = {"values": values, "octaves": octaves, "powers": powers, "v": torch.full((length, 1), 255)}
    return program(*steps, registers=registers, constants=constants)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("scale", [0.02, 0.0403, 0.1, 0.3, 3.7])
@pytest.mark.parametrize("length", [1, 7, 197, 3000, 2**15])
def test_a_row_of_probabilities_sums_to_no_more_than_is_proved(length, scale, published):
    """Rows of one largest score and many others of one distance: which sum to most lies just below a half octave."""
    table = exact_exponential(scale)
    made = softmax_row(table.values, table.octaves, POWERS, length, published)
    check_program(made)
    largest, run = prove_ranges(made)["y"][1], Interpreter(made)
    for distance in (0, 1, 5, 17, *torch.arange(0, 256, 13).tolist(), *(round(k * 0.6931 / scale) for k in range(16))):
        for first in (1, length // 3, length):
            row = torch.full((1, 1, length), 255 - min(distance, 255))
            row[..., : max(first, 1)] = 255
            assert int(run(row)) <= largest
    terms = prove_terms(made)["y"]
    assert terms.total <= 1.42 * (1 + length / 2**16) * 2**14 * 255 + 1 or published
    assert terms.digits == 8


@pytest.mark.parametrize("length", [181, 23170])
def test_the_bound_of_a_row_is_tight(length):
    """Equal scores whose number lies just below a half octave are rounded up by sqrt(2), all of them."""
    made = softmax_row(TABLE.values, TABLE.octaves, POWERS, length, False)
    found = int(Interpreter(made)(torch.zeros(1, 1, length, dtype=torch.int64)))
    assert found == length * (2**14 >> (length.bit_length() - 1)) * 255
    assert found <= prove_ranges(made)["y"][1] <= found * (1.002 + length / 2**16)


@dataclass(frozen=True)
class Form:
    """What a softmax to powers is."""

    steps: int
    zero: int
    offset: int
    scale: float


def numerators_of(form):
    """The tables that stand for the powers, as they are lowered."""
    scale = torch.tensor(1.0, dtype=torch.float64)
    return numerators(Powers("l", torch.tensor(form.zero), scale, steps=form.steps))


def rows_of_powers(form, length, table):
    """Sums of rows of one of the registers of numerators."""
    steps = (
        p.SoftmaxToPowers("l", "softmax", "x", None, "values", "octaves", form.zero, form.steps, form.offset, False),
        p.Lookup("o", "softmax", "l", "powers", 0),
        p.Product("y", "context", "o", "v", 0, 0),
    )
    registers = {
        "x": p.Register("u8", (-1, 1, length)), "l": p.Register("u8", (-1, 1, length)),
        "y": p.Register("s64", (-1, 1, 1)), "o": p.Register("u16", (-1, 1, length)),
        "values": p.Register("u16", (257,)), "octaves": p.Register("s32", (257,)),
        "powers": p.Register("u16", (len(table),)), "v": p.Register("u8", (length, 1)),
    }  # fmt: skip
    exponential = exact_exponential(form.scale)
    constants = {"values": exponential.values, "octaves": exponential.octaves, "powers": table}
    return program(*steps, registers=registers, constants={**constants, "v": torch.ones(length, 1, dtype=torch.long)})


def adversarial_rows(length, random):
    """Scores whose sums are extreme: some of the largest and the others at one distance or at two, and noise."""
    distance = torch.arange(256)[:, None].expand(256, length)
    rows = [255 - distance]
    for first in {1, 2, max(1, length // 3), max(1, length - 1), length}:
        rows.append(torch.where(torch.arange(length) < first, 255, 255 - distance))
    other = torch.randint(0, 256, (256, 1), generator=random)
    rows.append(torch.where(torch.arange(length) % 2 == 0, 255 - distance, 255 - other))
    rows.append(255 - (torch.randn(256, length, generator=random).abs() * torch.arange(256)[:, None] / 3).long())
    scores = torch.cat(rows).clamp(0, 255)
    scores[torch.rand(len(scores), generator=random) < 0.5, 0] = 255
    return scores[:, None]


FORMS = st.builds(
    Form,
    st.just(1),
    st.sampled_from([3, 7, 15, 16]),
    st.just(0) | st.integers(-50000, 8000),
    st.floats(log(1e-3), 1.0).map(exp),
) | st.builds(
    Form,
    st.just(2),
    st.sampled_from([3, 15, 16, 31]),
    st.just(0) | st.integers(-50000, 8000),
    st.floats(log(1e-3), 1.0).map(exp),
)


@settings(max_examples=60, deadline=None)
@given(FORMS, st.sampled_from([1, 2, 7, 50, 152, 197, 215, 300]), st.integers(0, 2**31))
def test_rows_of_each_register_of_numerators_sum_to_no_more_than_is_proved(form, length, seed):
    scores = adversarial_rows(length, torch.Generator().manual_seed(seed))
    for table, _ in numerators_of(form):
        made = rows_of_powers(form, length, table)
        check_program(made)
        assert int(Interpreter(made)(scores).max()) <= prove_ranges(made)["y"][1]


@pytest.mark.parametrize(("length", "step"), [(152, 0), (9741, 0), (215, 1), (861, 1)])
def test_the_bounds_of_rows_of_powers_of_the_root_are_tight(length, step):
    """Equal scores, the root of whose number lies just below a half, are rounded up by 2**(1/4), all of them."""
    form = Form(2, 31, 0, 0.05)
    made = rows_of_powers(form, length, numerators_of(form)[step][0])
    found = int(Interpreter(made)(torch.zeros(1, 1, length, dtype=torch.int64)))
    assert found <= prove_ranges(made)["y"][1] <= found * (1.005 + length / 2**16)


@pytest.mark.parametrize(
    ("steps", "zero", "offset", "length", "octaves"),
    [
        (1, 15, -3776, 2**15, 14.42),
        (1, 16, 320, 2**15, 14.42),
        (1, 15, -832, 20000, 13.2),
        (2, 31, -2752, 2**15, 14.42),
        (2, 31, 192, 20000, 13.2),
    ],
)
def test_long_rows_whose_exponentials_were_rounded_down_sum_to_more(steps, zero, offset, length, octaves):
    """One largest score and many others whose values lose a third: found by a search of scales and offsets."""
    form = Form(steps, zero, offset, octaves * log(2))
    scores = torch.full((1, 1, length), 254)
    scores[..., 0] = 255
    found, bounds, rounded_up = [], [], 2 ** (1 / (2 * steps) - offset / 2**12)
    for table, _ in numerators_of(form):
        made = rows_of_powers(form, length, table)
        found.append(int(Interpreter(made)(scores)) / int(table.max()))
        bounds.append(prove_ranges(made)["y"][1] / int(table.max()))
    assert found
    assert all(low <= high for low, high in zip(found, bounds, strict=True))
    register = found.index(max(found))
    assert found[register] > rounded_up * 2 ** (register / 2)


@pytest.mark.parametrize("offset", [-1 << 12, -(5 << 12) + 1000, -(3 << 12) - 1000])
def test_the_bound_of_a_row_follows_the_first_power(offset):
    """Scores of 256 probabilities, in octaves: the bound is reached within what rounding makes at most."""
    form = Form(2, 31, offset, 0.05)
    tables = numerators_of(form)
    found = [int(Interpreter(rows_of_powers(form, 256, t))(torch.zeros(1, 1, 256).long())) for t, _ in tables]
    bounds = [prove_ranges(rows_of_powers(form, 256, t))["y"][1] for t, _ in tables]
    assert found
    assert all(low <= high for low, high in zip(found, bounds, strict=True))
    assert max(high / max(low, 1) for low, high in zip(found, bounds, strict=True) if low) <= 2**0.5 * 1.01


def test_the_product_of_a_deit_with_powers_of_the_root_is_exact_in_float32():
    """197 tokens, numerators of 16 bits and values of 8: both registers."""
    form = Form(2, 31, 0, 0.05)
    for table, _ in numerators_of(form):
        made = rows_of_powers(form, 197, table)
        made = replace(made, constants={**made.constants, "v": torch.full((197, 1), 255)})
        assert exact_products(made)["y"] is torch.float32


@pytest.mark.parametrize("size", [2, 9])
@pytest.mark.parametrize("step", [p.Permute("m", "here", "o", (0, 2, 1)), p.Reshape("m", "here", "o", (-1, 1, 0))])
def test_what_are_no_rows_any_more_sums_to_more(step, size):
    """All rows have their largest score in the first column: that sums to the number of rows, and so do all of them."""
    if isinstance(step, p.Reshape):
        step = replace(step, shape=(-1, 1, size * size))
    shape = (-1, size, size) if isinstance(step, p.Permute) else step.shape
    steps = (
        p.SoftmaxToPowers("l", "softmax", "x", None, "values", "octaves", 15, 1, 0, False),
        p.Lookup("o", "softmax", "l", "powers", 0),
        step,
        p.Product("y", "context", "m", "v", 0, 0),
    )
    codes = p.Register("u16", (-1, size, size))
    registers = {
        "x": p.Register("u8", codes.shape), "l": p.Register("u4", codes.shape), "o": codes,
        "v": p.Register("u8", (shape[2], 1)), "m": p.Register("u16", shape),
        "y": p.Register("s64", (*shape[:2], 1)), "values": p.Register("u16", (257,)),
        "octaves": p.Register("s32", (257,)), "powers": p.Register("u16", (16,)),
    }  # fmt: skip
    tables = {"values": TABLE.values, "octaves": TABLE.octaves, "powers": POWERS}
    made = program(*steps, registers=registers, constants={**tables, "v": torch.full((shape[2], 1), 255)})
    check_program(made)
    scores = torch.zeros(1, size, size, dtype=torch.int64)
    scores[..., 0] = 255
    found = int(Interpreter(made)(scores).max())
    assert size * 2**14 * 255 == found <= prove_ranges(made)["y"][1]
    assert found <= prove_terms(made)["y"].total


def test_tables_that_are_no_exponentials_prove_nothing():
    """With octaves of nothing each entry of a row is 1; once their sum was believed to be at most 1.6."""
    octaves, values = torch.zeros(257, dtype=torch.int64), torch.zeros(257, dtype=torch.int64)
    made = softmax_row(values, octaves, POWERS, 1000, False)
    check_program(made)
    found = int(Interpreter(made)(torch.zeros(1, 1, 1000, dtype=torch.int64)))
    assert found == 1000 * 2**14 * 255 <= prove_ranges(made)["y"][1]


@pytest.mark.parametrize("powers", [torch.full((16,), 2**14), POWERS + (POWERS == 0), torch.arange(16) * 4000])
def test_tables_that_are_no_powers_of_two_prove_nothing(powers):
    made = softmax_row(TABLE.values, TABLE.octaves, powers, 700, True)
    rows = torch.stack([torch.full((1, 700), 255 - distance) for distance in (0, 90, 255)])
    rows[..., 0] = 255
    assert int(Interpreter(made)(rows).max()) <= prove_ranges(made)["y"][1]
    assert prove_terms(made)["y"].total >= 700 * int(powers.max()) * 255


def test_rows_that_are_longer_than_the_sum_s_32_bits_are_refused():
    with pytest.raises(LoweringError, match="rows of 32769 are longer than 32768"):
        check_program(softmax_row(TABLE.values, TABLE.octaves, POWERS, 2**15 + 1, False))


def test_scores_beyond_the_table_are_refused():
    """Entry 255 of 256 would have been read as masked."""
    values, octaves = (
        torch.cat([TABLE.values[:255], TABLE.values[-1:]]),
        torch.cat([TABLE.octaves[:255], TABLE.octaves[-1:]]),
    )
    with pytest.raises(LoweringError, match="scores from 0 to 255 leave a table of 255 levels"):
        check_program(softmax_row(values, octaves, POWERS, 5, False))


@pytest.mark.parametrize(("multiplier", "shift"), [(2**31, 20), (-1, 20), (1, 47), (1, 0)])
def test_a_uniform_softmax_whose_quotient_leaves_64_bits_is_refused(multiplier, shift):
    step = p.SoftmaxToLevels("y", "here", "x", None, "values", "octaves", 2**31 - 1, 46, 0, 0, 255)
    made = program(
        step,
        registers={
            "y": p.Register("u8", (-1, 4, 6)),
            "values": p.Register("u16", (257,)),
            "octaves": p.Register("s32", (257,)),
        },
        constants={"values": TABLE.values, "octaves": TABLE.octaves},
    )
    check_program(made)
    with pytest.raises(LoweringError, match=r"here: (multiplier|shift)"):
        check_program(replace(made, instructions=(replace(step, multiplier=multiplier, shift=shift),)))


def test_a_layer_norm_of_so_many_channels_that_a_spike_leaves_64_bits_is_refused():
    step = p.LayerNorm("y", "here", "x", None, 0, 1, 15, "one", "one", 1, 0, 15)
    made = one(step, p.Register("u4", (-1, 2**22)), (-1, 2**22), "u4", one=torch.tensor(1))
    with pytest.raises(LoweringError, match="4194304 channels up to 15 are too many"):
        check_program(made)


def test_sums_that_leave_64_bits_inside_the_proof_are_refused():
    """Or the proof itself would wrap around, and find a small range."""
    made = one(
        p.Linear("y", "here", "x", "w", None, 0, None),
        p.Register("s64", (-1, 4, 1)),
        (-1, 4, 8),
        "s32",
        w=torch.full((1, 8), 2**31 - 1),
    )
    with pytest.raises(LoweringError, match="here: its sums may exceed 64 bits"):
        check_program(made)

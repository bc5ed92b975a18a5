"""The proof of ranges: what it must bound, what it must not believe, and what it once did."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_programs import POWERS, TABLE, one, program

from vitquant.errors import LoweringError
from vitquant.integer.exponential import exact_exponential
from vitquant.program import instructions as p
from vitquant.program.checking import check_program
from vitquant.program.ranges import prove_ranges, prove_terms
from vitquant.runtime.interpreter import Interpreter


def softmax_row(values: torch.Tensor, octaves: torch.Tensor, powers: torch.Tensor, length: int, published: bool):
    """Probabilities of rows, times a register of 255."""
    steps = (
        p.LogSoftmax("l", "softmax", "x", None, "values", "octaves", 15, 1, 0, published),
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


@pytest.mark.parametrize("size", [2, 9])
@pytest.mark.parametrize("step", [p.Permute("m", "here", "o", (0, 2, 1)), p.Reshape("m", "here", "o", (-1, 1, 0))])
def test_what_are_no_rows_any_more_sums_to_more(step, size):
    """All rows have their largest score in the first column: that sums to the number of rows, and so do all of them."""
    if isinstance(step, p.Reshape):
        step = replace(step, shape=(-1, 1, size * size))
    shape = (-1, size, size) if isinstance(step, p.Permute) else step.shape
    steps = (
        p.LogSoftmax("l", "softmax", "x", None, "values", "octaves", 15, 1, 0, False),
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
    """Entry 255 of 256 would have been read as hidden."""
    values, octaves = (
        torch.cat([TABLE.values[:255], TABLE.values[-1:]]),
        torch.cat([TABLE.octaves[:255], TABLE.octaves[-1:]]),
    )
    with pytest.raises(LoweringError, match="scores from 0 to 255 leave a table of 255 levels"):
        check_program(softmax_row(values, octaves, POWERS, 5, False))


@pytest.mark.parametrize(("multiplier", "shift"), [(2**31, 20), (-1, 20), (1, 47), (1, 0)])
def test_a_uniform_softmax_whose_quotient_leaves_64_bits_is_refused(multiplier, shift):
    step = p.UniformSoftmax("y", "here", "x", None, "values", "octaves", 2**31 - 1, 46, 0, 0, 255)
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

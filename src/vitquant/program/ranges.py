"""The range of every register of a program for any input, from its constants: the proof that nothing overflows."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import isqrt, prod
from typing import assert_never

import torch
from torch import Tensor

from vitquant.errors import LoweringError
from vitquant.integer.exponential import OCTAVE_BITS, VALUE_BITS
from vitquant.integer.layer_norm import NORMALIZED_BITS
from vitquant.integer.softmax import LONGEST_ROW, step_bits
from vitquant.program import instructions as p

Range = tuple[int, int]

# `integer.softmax` rounds the exponent to the nearest step, of which an octave has one or two. So a power can be up to
# sqrt(2) or 2**(1/4) times the probability, and slightly more where the logarithm of the row's sum was rounded down, by
# little more than 2**-12 of an octave; with the published rounding it is at most 3/2 times the probability.
_NEAREST, _PUBLISHED = {1: Fraction(1415, 1000), 2: Fraction(1190, 1000)}, Fraction(3, 2)
_OCTAVE = Fraction(1, 2 ** (OCTAVE_BITS + 1))  # half a unit of an octave bounds the relative error too


@dataclass(frozen=True)
class Terms:
    """Bounds on the terms that an instruction sums.

    Arguments:
        total: a bound on the sum of absolute values of the terms, bias included, and on every operand.
        digits: the most significant bits that an operand has after its zero point is subtracted.
    """

    total: int
    digits: int


def prove_ranges(program: p.IntegerProgram) -> dict[str, Range]:
    """For each register the smallest and the largest value that it can have for any image.

    Arguments:
        program: its names, fields and shapes are valid, which `check_program` checks.

    Raises:
        LoweringError: a register can exceed its type, a code its table, or an intermediate result 64 bits; the message
            names the site.
    """
    return _Proof(program).ranges


def prove_terms(program: p.IntegerProgram) -> dict[str, Terms]:
    """For the output of each `Linear`, `Convolution` and `Product` the bounds on the terms of its sums.

    Raises:
        LoweringError: see `prove_ranges`.
    """
    return _Proof(program).terms


class _Proof:
    """Propagates ranges through a program in one pass.

    Beside the range of each register it has bounds on the sum of a row of probabilities: for codes of powers a bound on
    the sum of the powers (`probabilities`), for numerators one on the sum of the numerators (`row_sums`).
    """

    def __init__(self, program: p.IntegerProgram) -> None:
        self.program = program
        self.ranges: dict[str, Range] = {name: _extremes(values) for name, values in program.constants.items()}
        self.ranges[program.input] = program.registers[program.input].limits
        self.terms: dict[str, Terms] = {}
        self.probabilities: dict[str, _Powers] = {}
        self.row_sums: dict[str, int] = {}
        self.magnitudes: dict[tuple[str, str | None], tuple[Tensor, Tensor]] = {}
        for instruction in program.instructions:
            low, high = self.ranges[instruction.output] = self._range(instruction)
            least, most = program.registers[instruction.output].limits
            if low < least or high > most:
                kind = program.registers[instruction.output].type
                where = f"{instruction.site}: values from {low} to {high} do not fit {kind}"
                raise LoweringError(f"{where}; use fewer bits for its operands")

    def _range(self, instruction: p.Instruction) -> Range:
        match instruction:
            case p.Linear() | p.Convolution() as i:
                return self._weighted(i)
            case p.Product() as i:
                return self._product(i)
            case p.Multiply() as i:
                left, right = self._less(i.left, i.left_zero), self._less(i.right, i.right_zero)
                corners = [a * b for a in left for b in right]
                return min(corners), max(corners)
            case p.Requantize() as i:
                return self._requantized(i)
            case p.SoftmaxToPowers() as i:
                return self._softmax_to_powers(i)
            case p.SoftmaxToLevels() as i:
                self._row_of_scores(i)
                return i.low, i.high
            case p.LayerNorm() | p.RmsNorm() as i:
                return self._norm(i)
            case p.Lookup() as i:
                return self._looked_up(i)
            case p.Sum() as i:
                low, high = self._less(i.input, i.input_zero)
                count = prod(self.program.registers[i.input].shape[axis] for axis in i.axes)
                return count * low, count * high
            case p.Concat() as i:
                ranges = [self.ranges[name] for name in i.inputs]
                return min(low for low, _ in ranges), max(high for _, high in ranges)
            case p.Pad() as i:
                low, high = self.ranges[i.input]
                return min(low, i.value), max(high, i.value)
            case p.Reshape() | p.Permute() | p.Slice() | p.Roll() as i:
                keeps_rows = self._keeps_rows(i)
                if keeps_rows and i.input in self.probabilities:
                    self.probabilities[i.output] = self.probabilities[i.input]
                if keeps_rows and i.input in self.row_sums:
                    self.row_sums[i.output] = self.row_sums[i.input]
                return self.ranges[i.input]
            case _:
                assert_never(instruction)

    def _less(self, name: str, zero: int) -> Range:
        low, high = self.ranges[name]
        return low - zero, high - zero

    # Sums of products.

    def _weighted(self, i: p.Linear | p.Convolution) -> Range:
        """The extremes of each output channel, from its own weights."""
        low, high = self._less(i.input, i.input_zero)
        if isinstance(i, p.Convolution):
            low, high = min(low, 0), max(high, 0)  # padding is zero
        sizes = self.program.constants[i.weight].shape
        widest = _largest(self.ranges[i.weight]) + (_largest(self.ranges[i.weight_zero]) if i.weight_zero else 0)
        added = _largest(self.ranges[i.bias]) if i.bias else 0
        if sizes[1:].numel() * widest * max(-low, high, 1) + added >= 2**62:
            raise LoweringError(f"{i.site}: its sums may exceed 64 bits; use fewer bits for its operands")
        up, down = self._magnitudes(i.weight, i.weight_zero)
        bias = self.program.constants[i.bias] if i.bias else torch.zeros((), dtype=torch.int64)
        total = int(((up - down) * max(-low, high) + bias.abs()).max())
        operands = [self.ranges[i.input], (i.input_zero, widest), (low, high)]
        self.terms[i.output] = Terms(max(total, *map(_largest, operands)), _digits(max(-low, high, widest)))
        return int((up * low + down * high + bias).min()), int((up * high + down * low + bias).max())

    def _magnitudes(self, weight: str, zero: str | None) -> tuple[Tensor, Tensor]:
        """The sum of each channel's positive weights and that of its negative ones: (channels,) each."""
        if (weight, zero) not in self.magnitudes:
            values = self.program.constants[weight]
            values = (values if zero is None else values - self.program.constants[zero]).flatten(1)
            self.magnitudes[weight, zero] = values.clamp(min=0).sum(1), values.clamp(max=0).sum(1)
        return self.magnitudes[weight, zero]

    def _product(self, i: p.Product) -> Range:
        left, right = self._less(i.left, i.left_zero), self._less(i.right, i.right_zero)
        count, largest = self.program.registers[i.left].shape[-1], _largest(right)
        corners = [a * b for a in left for b in right]
        low, high, total = count * min(corners), count * max(corners), count * _largest(left) * largest
        digits = _digits(max(_largest(left), largest))
        if i.left in self.row_sums and i.left_zero == 0:
            row = self.row_sums[i.left]
            low, high = max(low, row * min(right[0], 0)), min(high, row * max(right[1], 0))
            total, digits = min(total, row * largest), _digits(largest)
        operands = [self.ranges[i.left], self.ranges[i.right], (i.left_zero, i.right_zero), left, right]
        self.terms[i.output] = Terms(max(total, *map(_largest, operands)), digits)
        return low, high

    def _requantized(self, i: p.Requantize) -> Range:
        bound = _largest(self.ranges[i.addend])
        for name, multiplier in zip(i.inputs, i.multipliers, strict=True):
            bound += _largest(self.ranges[name]) * _largest(self.ranges[multiplier])
        if bound >= 2**63:
            raise LoweringError(f"{i.site}: a rescaled sum may exceed 64 bits; use fewer bits for its operands")
        return i.low, i.high

    # Operations on codes.

    def _row_of_scores(self, i: p.Softmax) -> int:
        """The length of a row, after checking that the tables have an entry for each possible distance."""
        length = self.program.registers[i.input].shape[-1]
        if length > LONGEST_ROW:
            raise LoweringError(f"{i.site}: rows of {length} are longer than {LONGEST_ROW}; use smaller images")
        low, high = self.ranges[i.input]
        levels = len(self.program.constants[i.values]) - 1  # the last entry is for masked scores
        if high - low >= levels:
            raise LoweringError(f"{i.site}: scores from {low} to {high} leave a table of {levels} levels; report this")
        return length

    def _softmax_to_powers(self, i: p.SoftmaxToPowers) -> Range:
        """Bound the sum of 2**(-code / steps) over a row, without the codes of zero.

        With the sum s >= 1 of a row's values and the offset f, an entry of o octaves becomes at most
        c * 2**-(o + f) / s, with c from `_NEAREST`; where code 0 was clamped, it is less. The table of values equals
        2**-octaves except for rounding: that of the octaves is relative, and that of the values adds at most half a
        unit, the gain, for each entry that is not zero. So the sum of a row is at most
        c * 2**-f * (1 + rounding + gains / s), and at most the row's length.
        """
        length, factor = self._row_of_scores(i), _PUBLISHED
        if not i.published:
            values, octaves = self.program.constants[i.values], self.program.constants[i.octaves]
            digits = step_bits(i.steps)
            gains = torch.exp2(VALUE_BITS - octaves.double() / 2**OCTAVE_BITS) - values * float(1 + _OCTAVE)
            counts = (octaves + i.offset + (1 << (digits - 1)) - 1) >> digits < i.zero
            gain = Fraction(float((gains * counts).clamp(min=0).amax())) + Fraction(1, 2**20)
            largest = _NEAREST[i.steps] * Fraction(2 ** (-i.offset / 2**OCTAVE_BITS))
            factor = largest * (1 + _OCTAVE + length * gain / 2**VALUE_BITS)
        self.probabilities[i.output] = _Powers(i.zero, i.steps, min(factor, Fraction(length)))
        return 0, i.zero

    def _looked_up(self, i: p.Lookup) -> Range:
        table, (low, high) = self.program.constants[i.table], self.ranges[i.input]
        if low < i.lowest or high >= i.lowest + len(table):
            last = i.lowest + len(table) - 1
            raise LoweringError(
                f"{i.site}: codes from {low} to {high} leave a table of {i.lowest} to {last}; report this"
            )
        if i.input in self.probabilities:
            codes = self.probabilities[i.input]
            *powers, nothing = table[-i.lowest : codes.zero - i.lowest + 1].tolist()
            if nothing == 0 and all(power >= 0 and power.bit_count() <= 1 for power in powers):
                self.row_sums[i.output] = codes.row_of(powers)
        return self.ranges[i.table]

    def _norm(self, i: p.Norm) -> Range:
        """The bounds that `normalize` of `integer.layer_norm` and `integer.rms_norm` state."""
        channels = self.program.registers[i.input].shape[-1]
        shifts = self.ranges[i.factors][1] if i.factors else 0
        found = _largest(self._less(i.input, i.input_zero)) << shifts
        if found > i.largest:
            raise LoweringError(
                f"{i.site}: inputs up to {found} exceed {i.largest}, which it was made for; report this"
            )
        if channels * i.largest >= 2**30 or channels >= 2**22:
            raise LoweringError(f"{i.site}: {channels} channels up to {i.largest} are too many; use fewer bits")
        normalized = 3 * (isqrt(channels) + 1) << (NORMALIZED_BITS - 1)  # a root near 1, rounded down, is off by half
        if normalized * _largest(self.ranges[i.multiplier]) + _largest(self.ranges[i.addend]) >= 2**63:
            raise LoweringError(f"{i.site}: its affine part may exceed 64 bits; use more bits for its result")
        return i.low, i.high

    def _keeps_rows(self, i: p.Reshape | p.Permute | p.Slice | p.Roll) -> bool:
        """Whether every row of the result, along the last axis, is a row of the input."""
        before, after = self.program.registers[i.input].shape, self.program.registers[i.output].shape
        if isinstance(i, p.Permute):
            return i.axes[-1] == len(before) - 1
        return isinstance(i, p.Reshape) and before[-1] == after[-1] != -1


@dataclass(frozen=True)
class _Powers:
    """The codes of a softmax to powers.

    Arguments:
        zero: the code of zero.
        steps: the power of a code is 2**(-code / steps).
        row: a bound on the sum of the powers of a row.
    """

    zero: int
    steps: int
    row: Fraction

    def row_of(self, numerators: list[int]) -> int:
        """A bound on the sum of a row with the given integers, by code, in place of the powers.

        It is the bound on the sum of the powers times the largest ratio of an integer to its power. With two steps the
        ratio's square is an exact fraction, and the square root of the result is rounded down, since sums are integers.
        """
        largest = max(number**self.steps << code for code, number in enumerate(numerators))
        bound = int(self.row**self.steps * largest)
        return isqrt(bound) if self.steps == 2 else bound


def _extremes(values: Tensor) -> Range:
    low, high = torch.aminmax(values)
    return int(low), int(high)


def _largest(of: Range) -> int:
    """The largest absolute value."""
    return max(map(abs, of))


def _digits(largest: int) -> int:
    """The most significant bits of integers of at most this magnitude; 2**k itself has only one significant bit."""
    return max(1, (largest - 1).bit_length())

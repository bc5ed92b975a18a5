"""The exponential of integer scores, as a table: 8-bit codes have only 256 differences."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from math import floor

import torch
from torch import Tensor

from vitquant.integer.elementary import digits, exp, log, log2

VALUE_BITS = 15  # exp(0) = 1 is the integer 2**15
OCTAVE_BITS = 12  # an octave, a factor of 2, is the integer 2**12
MOST_OCTAVES = 2**18 - 1  # almost 64 octaves, more than an offset of `LARGEST_OFFSET` in `softmax` can compensate

# I-BERT's polynomial (Kim et al. 2021, section 3.4): exp(p) is about a p**2 + b p + c on [-log 2, 0].
_A, _B, _C = 0.35815147, 0.96963238, 1.0
_LOG_2 = 0.6931  # as published


@dataclass(frozen=True)
class Exponential:
    """Tables of exp(-scale * d) for the distances d = 0, 1 .. of a code from its row's largest.

    The last entry of each table is for masked entries.

    Arguments:
        values: int64 (levels + 1,), exp(-scale * d) times 2**15, at most 16 bits; 0 for a masked entry.
        octaves: int64 (levels + 1,), -log2(exp(-scale * d)) times 2**12, at most 18 bits.
    """

    values: Tensor
    octaves: Tensor

    @property
    def masked(self) -> int:
        """The index of the tables' entry for masked scores."""
        return len(self.values) - 1


def exact_exponential(scale: float, levels: int = 256) -> Exponential:
    """The tables of the exact exponential, rounded once.

    Arguments:
        scale: of the scores, positive.
        levels: the number of codes of a score.
    """
    with digits():
        step, octave, value = exp(-Decimal(scale)), Decimal(scale) / log(Decimal(2)), Decimal(1)
        values: list[tuple[Decimal, Decimal]] = []
        for distance in range(levels):
            values.append((value, distance * octave))
            value *= step
        return _tables(values)


def polynomial_exponential(scale: float, levels: int = 256) -> Exponential:
    """The tables of the exponential that FQ-ViT computes: I-BERT's integer polynomial with its integer constants.

    Source: FQ-ViT, Lin et al. 2022, section "Log-Int-Softmax", and its code; n = 30 there is the exponent by which
    intermediate results are scaled up, which overflows 32 bits and is not needed for a table.

    Pitfall: for scales above 0.1 its constants are small integers, and it is off by up to 0.15.
    """
    log_2, b, c = floor(-_LOG_2 / scale), floor(_B / _A / scale), max(1, floor(_C / _A / (scale * scale)))
    values: list[tuple[Decimal, Decimal]] = []
    with digits():
        for distance in range(levels):
            halvings, rest = divmod(max(-distance, 30 * log_2), log_2)
            value = Decimal(max(0, rest * (rest + b) + c)) / c / 2**halvings
            values.append((value, -log2(value)))
        return _tables(values)


def _tables(values: list[tuple[Decimal, Decimal]]) -> Exponential:
    """The tables from pairs of a value and minus its logarithm to base 2, which is infinite for 0."""
    least = [min(octaves * 2**OCTAVE_BITS, Decimal(MOST_OCTAVES)) for _, octaves in values]
    return Exponential(
        torch.tensor([*(round(value * 2**VALUE_BITS) for value, _ in values), 0]),
        torch.tensor([*(max(0, round(octaves)) for octaves in least), MOST_OCTAVES]),
    )

"""The exponential of integer scores, as a table: a softmax needs it for 256 differences only."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

VALUE_BITS = 15  # a value of 2**15 is exp(0) = 1
OCTAVE_BITS = 12  # an octave, a factor of 2, is 2**12
MOST_OCTAVES = 2**18 - 1  # 64 octaves down: more than `integer.softmax` can make up for by a scale

# I-BERT's polynomial (Kim et al. 2021, section 3.4): exp(p) is about a p**2 + b p + c on [-log 2, 0].
_A, _B, _C = 0.35815147, 0.96963238, 1.0
_LOG_2 = 0.6931  # as published


@dataclass(frozen=True)
class Exponential:
    """exp(-scale * d) for the distance d = 0, 1 .. from a row's largest code, and then once for hidden entries.

    Arguments:
        values: int64 (levels + 1,), times 2**15, at most 16 bits; 0 for a hidden entry.
        octaves: int64 (levels + 1,), minus the logarithm to base 2, times 2**12, at most 18 bits.
    """

    values: Tensor
    octaves: Tensor

    @property
    def hidden(self) -> int:
        """The distance that stands for an entry that a mask hides."""
        return len(self.values) - 1


def exact_exponential(scale: float, levels: int = 256) -> Exponential:
    """The exponential itself, rounded once.

    Arguments:
        scale: of the scores, positive.
        levels: how many codes a score has.
    """
    return _tables(-scale * torch.arange(levels, dtype=torch.float64) / log(2))


def polynomial_exponential(scale: float, levels: int = 256) -> Exponential:
    """The exponential that FQ-ViT computes, I-BERT's integer polynomial, with its integer constants.

    Source: FQ-ViT, Lin et al. 2022, section "Log-Int-Softmax", and its code; n = 30 there is the exponent by which
    intermediate results are scaled up, which overflows 32 bits and is not needed for a table.

    Pitfall: for scales above 0.1 its constants are small integers, and it is off by up to 0.15.
    """
    distance = -torch.arange(levels, dtype=torch.float64)
    log_2 = torch.floor(torch.tensor(-_LOG_2 / scale, dtype=torch.float64))
    b = torch.floor(torch.tensor(_B / _A / scale, dtype=torch.float64))
    c = torch.floor(torch.tensor(_C / _A / scale**2, dtype=torch.float64)).clamp(min=1.0)  # 0 for scales above 1.67
    distance = torch.maximum(distance, 30 * log_2)
    halvings = torch.floor(distance / log_2)
    rest = distance - halvings * log_2
    value = (rest * (rest + b) + c).clamp(min=0.0)
    return _tables(torch.log2(value / value[0]) - halvings)


def _tables(logarithm: Tensor) -> Exponential:
    """From the logarithm to base 2 of every value."""
    values = torch.round(torch.exp2(logarithm + VALUE_BITS)).to(torch.int64)
    octaves = torch.round(-logarithm * 2**OCTAVE_BITS).clamp(0, MOST_OCTAVES).to(torch.int64)
    hidden = torch.tensor([0]), torch.tensor([MOST_OCTAVES])
    return Exponential(torch.cat([values, hidden[0]]), torch.cat([octaves, hidden[1]]))

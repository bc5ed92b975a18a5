"""Softmax of integer codes, with results at powers of two or of its square root, or on equally spaced levels."""

from __future__ import annotations

import torch
from torch import Tensor

from vitquant.integer.arithmetic import bit_length, logarithm, shift_right
from vitquant.integer.exponential import OCTAVE_BITS, VALUE_BITS, Exponential

LONGEST_ROW = 2**15  # a row of exponentials of at most 2**15 sums to less than 2**31
ROW_BITS = 16
LARGEST_OFFSET = 32 << OCTAVE_BITS  # 32 octaves, half of those of a masked entry


def distances(codes: Tensor, mask: Tensor | None, exponential: Exponential) -> Tensor:
    """How far each score lies below the largest of its row.

    Arguments:
        codes: int64 (..., row).
        mask: bool, broadcastable to codes, True where an entry is masked; a row may be masked entirely.
        exponential: determines the index of masked entries.

    Returns:
        int64 of the shape of codes: indices into the tables of `exponential`.
    """
    if mask is None:
        return codes.amax(-1, keepdim=True) - codes
    largest = codes.masked_fill(mask, torch.iinfo(codes.dtype).min).amax(-1, keepdim=True)
    return (largest - codes).masked_fill(mask, exponential.masked)


def row_sums(distance: Tensor, exponential: Exponential) -> Tensor:
    """The sum of the exponentials of each row, times 2**15: int64 (..., 1), at least 2**15 even for a masked row."""
    return exponential.values.take(distance).sum(-1, keepdim=True).clamp(min=1 << VALUE_BITS)


def log_int_softmax(distance: Tensor, exponential: Exponential, zero: int, steps: int = 1, offset: int = 0) -> Tensor:
    """Probabilities as powers: the code k of scale * 2**(-k / steps), rounded to the nearest exponent.

    -log2(probability) = log2(row sum) + octaves, so that elements need neither a division nor a logarithm.

    Arguments:
        distance: from `distances`.
        zero: the code of zero, at most 16 * steps; larger exponents get it too.
        steps: the number of powers in an octave, 1 or 2.
        offset: log2(scale) * 2**12, rounded, at most `LARGEST_OFFSET` in magnitude; 0 for a scale of 1.

    Returns:
        int64 codes 0..zero. They are those of the real exponential divided by the table's row sum, except where
        steps * log2(probability / scale) lies within steps * 2**-11 (with an offset, steps * 5 * 2**-13) of the middle
        between two integers; the error of the row sum is at most (N - 1) / 2**16 of a row's largest exponential, for
        rows of N entries.

    Source: FQ-ViT, Lin et al. 2022, section "Log-Int-Softmax", which divides, rounds the quotient to an integer, and
    rounds that to a power of two, up from 1.5 times a power on. Powers of sqrt(2) are RepQ-ViT's, Li et al. 2023.
    """
    total = logarithm(row_sums(distance, exponential), OCTAVE_BITS) - (VALUE_BITS << OCTAVE_BITS)
    return shift_right(exponential.octaves.take(distance) + (total + offset), step_bits(steps)).clamp(0, zero)


def step_bits(steps: int) -> int:
    """log2 of the distance between two codes, in units of `Exponential.octaves`.

    Arguments:
        steps: the number of powers in an octave, 1 or 2.
    """
    return OCTAVE_BITS - (steps.bit_length() - 1)


def published_log_int_softmax(distance: Tensor, exponential: Exponential, zero: int) -> Tensor:
    """`log_int_softmax` with the rounding of FQ-ViT's code.

    The inverse probability is rounded to an integer, halves up; its logarithm is rounded up from 1.5 * 2**k on.

    Source: FQ-ViT's code (`models/ptq/layers.py`, `log_round`).
    """
    value = exponential.values.take(distance)
    inverse = torch.div(2 * row_sums(distance, exponential) + value, (2 * value).clamp(min=1), rounding_mode="floor")
    whole = bit_length(inverse) - 1
    return (whole + (2 * inverse >= 3 << whole)).clamp(max=zero)


def integer_softmax(distance: Tensor, exponential: Exponential, multiplier: int, shift: int) -> Tensor:
    """Probabilities on equally spaced levels, in units of the output's scale, without zero point and clamp.

    Arguments:
        distance: from `distances`.
        multiplier, shift: 1 / (scale of the output) = multiplier / 2**shift, multiplier below 2**31.

    Returns:
        int64, the rounded quotient. For probability p in a row of N entries with the sum S >= 2**15 its error is at
        most 1/2 + 2**-12 steps plus (1 + p (N - 1)) / (2 S) in probability, since the table is rounded.
    """
    reciprocal = torch.div(multiplier << ROW_BITS, row_sums(distance, exponential), rounding_mode="floor")
    return shift_right(exponential.values.take(distance) * reciprocal, shift + ROW_BITS)

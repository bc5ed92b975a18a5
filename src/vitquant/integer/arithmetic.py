"""Square root, logarithm and rescaling in integers.

Tensors are int64. `rescaling` turns real ratios into integers; it runs once, in float64, when a model is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp

import torch
from torch import Tensor

MULTIPLIER_BITS = 31
_OFFSET_BITS = 61  # an offset below 2**61 and a product below 2**62 add up within 64 bits
_LARGEST_SHIFT = 61


def bit_length(x: Tensor) -> Tensor:
    """The number of binary digits of x >= 0: 0 for 0, floor(log2 x) + 1 otherwise."""
    length = torch.zeros_like(x)
    for digits in (32, 16, 8, 4, 2, 1):
        rest = x >> digits
        large = rest > 0
        length += large * digits
        x = torch.where(large, rest, x)
    return length + x


def square_root(x: Tensor) -> Tensor:
    """floor(sqrt(x)), exact for every 0 <= x < 2**62.

    Newton's iteration, started at a power of two between sqrt(x) and 2 sqrt(x), decreases monotonically to the floor
    in at most six steps; taking the minimum keeps it there.

    Pitfall: I-ViT's code takes ten steps from 2**16 instead, whose result is wrong for x below about 10**5.
    """
    root = torch.ones_like(x) << ((bit_length(x) + 1) >> 1)
    for _ in range(7):
        root = torch.minimum(root, (root + torch.div(x, root.clamp(min=1), rounding_mode="floor")) >> 1)
    return root


def logarithm(x: Tensor, fraction_bits: int) -> Tensor:
    """log2(x) * 2**fraction_bits, rounded down, for 1 <= x < 2**31.

    It is computed one binary digit after another: squaring a number in [1, 2) doubles its logarithm. The result may be
    one less than the floor where log2(x) * 2**fraction_bits lies within 2**-15 above an integer.

    Arguments:
        fraction_bits: at most 14.
    """
    whole = bit_length(x) - 1
    mantissa = x << (30 - whole)
    for _ in range(fraction_bits):
        mantissa = (mantissa * mantissa) >> 30
        digit = mantissa >> 31
        mantissa = mantissa >> digit
        whole = (whole << 1) + digit
    return whole


def shift_right(x: Tensor, digits: int) -> Tensor:
    """x / 2**digits rounded to nearest, halves up; digits >= 1."""
    return (x + (1 << (digits - 1))) >> digits


def shift_left(x: Tensor, digits: int) -> Tensor:
    """The float64 x * 2**digits, exact for 0 <= digits < 64, unlike `torch.ldexp`, which computes a power."""
    return x * float(1 << digits)


@dataclass(frozen=True)
class Rescaling:
    """The integers with which `(x * multiplier + addend) >> shift` is `ratio * x + offset`, rounded.

    Arguments:
        multiplier: int64, at most 31 bits and a sign; () or one per channel.
        addend: int64 of the same shape: the offset plus one half for rounding, in units of 2**-shift.
        shift: a number of bits, the same for all channels.
    """

    multiplier: Tensor
    addend: Tensor
    shift: int

    def apply(self, x: Tensor, low: int, high: int) -> Tensor:
        """The rescaled x, clamped to low..high; |x| * multiplier must stay below 2**62."""
        return ((x * self.multiplier + self.addend) >> self.shift).clamp(low, high)


def rescaling(ratio: Tensor, offset: Tensor) -> Rescaling:
    """The integers for `ratio * x + offset`.

    The multiplier of the largest ratio has 31 bits, unless an offset is so much larger that the addend would overflow;
    in a channel whose ratio is 2**-k of the largest it has 31 - k bits. The error of the result is at most
    1/2 + (|x| + 1) * 2**-(shift + 1). Ratios must be below 2**30.

    Arguments:
        ratio: float64, finite, () or (channels,), of either sign.
        offset: float64 of the same shape, in units of the result.
    """
    _, exponent = frexp(ratio.abs().amax().item())  # ratio < 2**exponent
    room = _OFFSET_BITS - frexp(offset.abs().amax().item() + 1)[1]
    shift = max(1, min(MULTIPLIER_BITS - exponent, room, _LARGEST_SHIFT))
    multiplier = torch.round(shift_left(ratio, shift)).clamp(max=2.0**MULTIPLIER_BITS - 1)
    addend = torch.round(shift_left(offset, shift))
    return Rescaling(multiplier.to(torch.int64), addend.to(torch.int64) + (1 << (shift - 1)), shift)

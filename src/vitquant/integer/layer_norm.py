"""LayerNorm of integers."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from vitquant.integer.arithmetic import Rescaling, shift_right, square_root

NORMALIZED_BITS = 16  # normalized values are integers times 2**-16
_ROOT_BITS = 62
RECIPROCAL_BITS = 50


def integer_epsilon(epsilon: float, scale: float, channels: int) -> int:
    """LayerNorm's epsilon in the units of `spread` in `normalize`: at least 1, to avoid division by zero.

    Arguments:
        epsilon: of the float LayerNorm, added to the variance.
        scale: the real value of an integer input of 1.
        channels: the number of normalized channels.
    """
    return max(1, min(round(Fraction(epsilon) * channels**2 / Fraction(scale) ** 2), 2**60))


def guard_bits(channels: int, largest: int, epsilon: int) -> int:
    """The number of fractional bits that the standard deviation can have within 64 bits.

    Arguments:
        channels: the number of normalized channels.
        largest: a bound on |x|.
        epsilon: from `integer_epsilon`.
    """
    return max(0, min(12, (_ROOT_BITS - ((channels * largest) ** 2 + epsilon).bit_length()) // 2))


def normalize(x: Tensor, epsilon: int, largest: int) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) over the last axis, times 2**16.

    Arguments:
        x: int64 (..., channels).
        epsilon: from `integer_epsilon`.
        largest: a bound on |x|; channels * largest must stay below 2**30.

    Returns:
        int64, at most sqrt(channels) * 2**16 in absolute value. The error of the normalized value is 2**-17 from
        rounding plus a relative error of 2**-g / (C d) + C d 2**-50 from square root and reciprocal, with C channels,
        the standard deviation d and g guard bits.
    """
    channels, total = x.shape[-1], x.sum(-1, keepdim=True)
    spread = channels * (x * x).sum(-1, keepdim=True) - total * total
    return divided_by_root(channels * x - total, spread, epsilon, channels, largest)


def divided_by_root(x: Tensor, squares: Tensor, epsilon: int, channels: int, largest: int) -> Tensor:
    """x / sqrt(squares + epsilon), times 2**16, rounded.

    Arguments:
        x: int64 (..., channels), the values to be normalized, times channels.
        squares: int64 (..., 1), the mean of the squares of these values, times channels**2.
        epsilon, channels, largest: as for `normalize`.
    """
    guard = guard_bits(channels, largest, epsilon)
    root = square_root((squares + epsilon) << (2 * guard))  # channels * deviation * 2**guard, at least 1
    reciprocal = torch.div(1 << (RECIPROCAL_BITS + guard), root, rounding_mode="floor")
    return shift_right(x * reciprocal, RECIPROCAL_BITS - NORMALIZED_BITS)


@dataclass(frozen=True)
class Norm:
    """The constants of an integer norm over the last axis.

    Arguments:
        epsilon: from `integer_epsilon`.
        largest: a bound on |x|.
        affine: the rescaling of normalized values to the output's codes, with gain and bias.
        low, high: the smallest and largest code of the output.
    """

    epsilon: int
    largest: int
    affine: Rescaling
    low: int
    high: int


class LayerNorm(Norm):
    """The constants of an integer LayerNorm."""

    def apply(self, x: Tensor) -> Tensor:
        """The codes of the normalized x, an int64 tensor (..., channels) on one scale."""
        return self.affine.apply(normalize(x, self.epsilon, self.largest), self.low, self.high)


def published_layer_norm(x: Tensor, gain: Tensor, bias: Tensor, scale: Tensor | float, output_scale: Tensor) -> Tensor:
    """LayerNorm as FQ-ViT's code computes it: integer input, float statistics, 8-bit multipliers, no epsilon.

    For each element, scale * gain / (deviation * output_scale) is rounded down to M / 2**N with 128 <= M <= 255, and
    the bias is rounded to an integer times 2**-N.

    Arguments:
        x: int64 (..., channels) on one scale.
        gain, bias: float64 (channels,).
        scale: the real value of an x of 1, float64 () or a number.
        output_scale: of the output, float64 () or (channels,).

    Returns:
        int64: the output in units of its scale, without zero point and clamp.

    Source: FQ-ViT's code (`models/ptq/layers.py`, `QIntLayerNorm`, mode "int").

    Pitfalls: the deviation of a constant row is zero, and is replaced by 1 / channels of a step. The float square root
    and the multipliers per element make it a simulation; it cannot be lowered to an integer program.
    """
    channels, integers = x.shape[-1], x.double()
    mean = integers.mean(-1, keepdim=True) * scale
    spread = channels * integers.square().sum(-1, keepdim=True) - integers.sum(-1, keepdim=True).square()
    deviation = spread.sqrt().clamp(min=1.0) * (scale / channels)
    slope = scale / deviation * gain / output_scale
    shift = (7 - torch.floor(torch.log2(slope.abs()))).clamp(0, 31)  # 31 for a gain of zero
    multiplier = torch.floor(slope.abs() * torch.exp2(shift)).clamp(0, 255)
    offset = torch.round((bias - mean / deviation * gain) / output_scale * torch.exp2(shift))
    return torch.round((slope.sign() * multiplier * integers + offset) / torch.exp2(shift)).to(torch.int64)

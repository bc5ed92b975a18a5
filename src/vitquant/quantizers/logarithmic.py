"""Levels at powers of two and of its square root: the schemes `Log2` and `LogSqrt2`."""

from __future__ import annotations

from math import isqrt, log2, sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitquant.quantizers.quantizer import Quantizer
from vitquant.spec import Logarithmic


class LogarithmicQuantizer(Quantizer):
    """`code = round(-steps * log2(x / scale))`, `x = scale * 2**(-code / steps)`; the largest code means exactly zero.

    With `separate_zero` all 2**bits codes are powers, and zero has the extra code 2**bits.

    Rounding is to the nearest exponent, so the thresholds lie at 2**(-1 / (2 * steps)) times a level. Values that are
    nearer (in this sense) to the level after the last one, and values that are not positive, become zero; values above
    `scale` become `scale`. Levels and thresholds are computed from the exponent and mantissa of x / scale, never from a
    logarithm, so they are the same on every device. The error in [0, scale] is at most
    (2**(1 / (2 * steps)) - 1) * x above the last threshold and x below it. The gradient to x is 1 where x is rounded to
    a power, and 0 where it is saturated or becomes zero.

    Arguments:
        spec: unsigned, at most 8 bits.
        params: scale, () or (n,), the largest value; no zero_point.

    Attributes:
        steps: the number of levels in an octave.

    Pitfall: float32 cannot hold every level of 7 or 8 bits: those below its smallest subnormal number
        (2**-149) are zero, and among the subnormal ones a code need not decode to itself.
    """

    steps: ClassVar[int]

    def error_bound(self, x: Tensor) -> Tensor:
        """(2**(1 / (2 * steps)) - 1) * x, or x where x becomes zero, plus `2 * eps(x.dtype) * x` for rounding."""
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        zeroed = self._nearest_level(work / self.step_along(work)) == 0
        relative = torch.where(zeroed, 1.0, 2 ** (1 / (2 * self.steps)) - 1) + 2 * torch.finfo(x.dtype).eps
        return work.abs() * relative.to(work.dtype)

    def range(self) -> tuple[Tensor, Tensor]:
        """Zero and scale, the values of the largest and the smallest code: float32, () or one per channel."""
        return torch.zeros_like(self.scale), self.scale

    @property
    def zero_code(self) -> int:
        """The code of zero: the largest code of b bits, or with `separate_zero` the next one, at most 255."""
        scheme = self.spec.scheme
        return min(255, self.spec.qmax + (isinstance(scheme, Logarithmic) and scheme.separate_zero))

    def _nearest_level(self, ratio: Tensor) -> Tensor:
        return _NearestPower.apply(ratio, self.steps, self.zero_code - 1)  # type: ignore[return-value]

    def _code(self, level: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(level)
        return torch.where(level == 0, self.zero_code, _below(mantissa, self.steps) - self.steps * exponent)

    def _level(self, code: Tensor) -> Tensor:
        octaves = torch.floor(code / self.steps)
        level = _fractions(code - self.steps * octaves, self.steps) * _powers_of_two(octaves)
        return torch.where(code == self.zero_code, 0.0, level)


class Log2Quantizer(LogarithmicQuantizer):
    """`LogarithmicQuantizer` on powers of two.

    Source: FQ-ViT, Lin et al. 2022, section "Log-Int-Softmax".

    Pitfall: b bits hold 2**b - 1 powers and zero. FQ-ViT's code has 2**b powers and zero (`separate_zero`), one level
        more than b bits can hold, and rounds at 1.5 times a level.
    """

    steps = 1


class LogSqrt2Quantizer(LogarithmicQuantizer):
    """`LogarithmicQuantizer` on powers of the square root of two.

    The level of an odd code is sqrt(1/2), rounded once to float32 (float64 for float64 operands), times a power of two.

    Source: RepQ-ViT, Li et al. 2023, its log-sqrt2 quantizer.

    Pitfall: b bits hold 2**b - 1 powers and zero. RepQ-ViT's code has 2**b powers and zero (`separate_zero`).
    """

    steps = 2


def power(code: int, steps: int) -> float:
    """2**(-code / steps), rounded once.

    Arguments:
        steps: 1 or 2.
    """
    return sqrt(0.5 ** (2 * code // steps))


def threshold(code: int, steps: int, dtype: torch.dtype) -> float:
    """The smallest number of a dtype whose logarithm is nearer to 2**(-code / steps) than to the next power.

    It is 2**(-(code + 1/2) / steps), rounded up by an integer root, so that comparing a number of the dtype with it is
    the same as comparing with the exact threshold.

    Arguments:
        steps: 1 or 2.
        dtype: float32 or float64; the threshold is one of its normal numbers.
    """
    digits = 1 - int(log2(torch.finfo(dtype).eps))
    octaves, quarters = divmod((2 * code + 1) * (2 // steps), 4)
    root = isqrt(isqrt(1 << (4 * digits - quarters))) + 1  # it is irrational: one above the floor is the ceiling
    return root / 2.0 ** (digits + octaves)


def _below(mantissa: Tensor, steps: int) -> Tensor:
    """How many thresholds between 1/2 and 1 lie above a mantissa: the number of steps from 1 down to its level."""
    found = torch.zeros_like(mantissa)
    for code in range(steps):
        found += mantissa < threshold(code, steps, mantissa.dtype)
    return found


def _powers_of_two(octaves: Tensor) -> Tensor:
    """2**-octaves for octaves 0..255, from a table: `torch.ldexp` and others compute a power, which is not exact."""
    powers = torch.tensor([2.0**-octave for octave in range(256)], dtype=octaves.dtype, device=octaves.device)
    return powers.take(octaves.to(torch.int64))


def _fractions(code: Tensor, steps: int) -> Tensor:
    """2**(-code / steps) for codes 0..steps, rounded once."""
    fraction = torch.ones_like(code)
    for each in range(1, steps + 1):
        fraction = torch.where(code >= each, power(each, steps), fraction)
    return fraction


class _NearestPower(torch.autograd.Function):
    """Round to 1, 2**(-1 / steps) .. 2**(-last / steps) or 0, whichever has the nearest logarithm."""

    @staticmethod
    def forward(ratio: Tensor, steps: int, last: int) -> Tensor:
        clamped = ratio.clamp(0.0, 1.0)
        mantissa, exponent = torch.frexp(clamped)  # mantissa in [1/2, 1)
        below = _below(mantissa, steps)
        octave = clamped / mantissa  # exact: the power of two that frexp splits off
        is_zero = ((below - steps * exponent > last) | (clamped == 0)) & ~clamped.isnan()
        return (octave * _fractions(below, steps)).masked_fill(is_zero, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward((output != 0) & (inputs[0] <= 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None

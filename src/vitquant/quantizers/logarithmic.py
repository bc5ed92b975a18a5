"""Powers of two: the scheme `Log2`."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from vitquant.quantizers.quantizer import Quantizer
from vitquant.spec import Log2

SQRT_HALF = sqrt(0.5)


class Log2Quantizer(Quantizer):
    """`code = round(-log2(x / scale))`, `x = scale * 2**-code`; the largest code means exactly zero.

    With `Log2(separate_zero=True)` all 2**bits codes are powers and zero is one more, 2**bits.

    Rounding is to the nearest exponent, so the thresholds lie at sqrt(1/2) times a level. What is nearer
    (in this sense) to the level after the last one, or not positive, becomes zero; what exceeds `scale`
    becomes `scale`. Levels and thresholds come from the exponent and mantissa of x / scale, never from a
    logarithm, so powers of two are exact on every device. The error in [0, scale] is at most
    (sqrt(2) - 1) * x above the last threshold and x below it. The gradient to x is 1 there and 0 where
    x was saturated or became zero.

    Arguments:
        spec: unsigned, at most 8 bits.
        params: scale, () or (n,), the largest value; no zero_point.

    Source: FQ-ViT, Lin et al. 2022, section "Log-Int-Softmax".

    Pitfalls:
        b bits hold 2**b - 1 powers and zero. FQ-ViT's code has 2**b powers and zero (`separate_zero`), one level
        more than b bits can hold, and rounds at 1.5 times a level.
        float32 cannot hold every level of 7 or 8 bits: those below its smallest subnormal number
        (2**-149) are zero, and among the subnormal ones a code need not decode to itself.
    """

    def error_bound(self, x: Tensor) -> Tensor:
        """(sqrt(2) - 1) * x, or x where that becomes zero, and `eps(x.dtype) * x` for rounding."""
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        zeroed = self._nearest_level(work / self._step(work)) == 0
        relative = torch.where(zeroed, 1.0, sqrt(2.0) - 1.0) + torch.finfo(x.dtype).eps
        return work.abs() * relative.to(work.dtype)

    def range(self) -> tuple[Tensor, Tensor]:
        """Zero and scale, the values of the largest and the smallest code: float32, () or one per channel."""
        return torch.zeros_like(self.scale), self.scale

    @property
    def zero_code(self) -> int:
        """The code of zero: the largest of b bits, or the one after them, if a byte still holds it."""
        scheme = self.spec.scheme
        return min(255, self.spec.qmax + (isinstance(scheme, Log2) and scheme.separate_zero))

    def _nearest_level(self, ratio: Tensor) -> Tensor:
        return _NearestPower.apply(ratio, self.zero_code - 1)  # type: ignore[return-value]

    def _code(self, level: Tensor) -> Tensor:
        exponent = torch.frexp(level).exponent  # of 2**-k: 1 - k
        return torch.where(level == 0, self.zero_code, 1 - exponent)

    def _level(self, code: Tensor) -> Tensor:
        return torch.where(code == self.zero_code, 0.0, torch.ldexp(torch.ones_like(code), -code))


class _NearestPower(torch.autograd.Function):
    """1, 1/2 .. 2**-last or 0, whichever is nearest to the argument by its logarithm."""

    @staticmethod
    def forward(ctx: Any, ratio: Tensor, last: int) -> Tensor:
        clamped = ratio.clamp(0.0, 1.0)
        mantissa = torch.frexp(clamped).mantissa  # in [1/2, 1)
        power = clamped / mantissa  # exact: the power of two that frexp splits off
        level = torch.where(mantissa >= SQRT_HALF, power, power / 2)
        is_zero = (clamped < SQRT_HALF * 2.0**-last) | (clamped == 0)
        ctx.save_for_backward(~is_zero & (ratio <= 1))
        return level.masked_fill(is_zero, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return grad * inside, None

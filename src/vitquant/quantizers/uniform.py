"""Equally spaced levels: the schemes `Uniform` and `PowerOfTwoScale`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitquant.quantizers.quantizer import Quantizer
from vitquant.spec import Uniform


class UniformQuantizer(Quantizer):
    """`codes = clamp(round(x / scale) + zero_point, qmin, qmax)`, `x = (codes - zero_point) * scale`.

    Rounding is to nearest, halves to even. Inside `range()` the error is at most half a step.

    Arguments:
        spec: its scheme is `Uniform` or `PowerOfTwoScale` (whose scale is a power of two already).
        params: scale and zero_point, () or (n,).

    Source: Jacob et al. 2018, equation 1; gradients, LSQ, Esser et al. 2020.

    Attributes:
        rounding: while the rounding of a weight is learned, how far each element goes from the level below it to the
            one above, 0 to 1; None for rounding to the nearest level. See `quantizers.learnable`.

    Pitfall: the range seldom ends exactly at the observed extremes, because zero has a code of its own.
    """

    rounding: Tensor | None = None

    def error_bound(self, x: Tensor) -> Tensor:
        """Half a step plus `eps(x.dtype) * (|x| + step)` for the rounding of arithmetic and cast."""
        step = self.step_along(x.to(torch.promote_types(x.dtype, torch.float32)))
        return 0.5 * step + torch.finfo(x.dtype).eps * (x.abs().to(step.dtype) + step)

    def range(self) -> tuple[Tensor, Tensor]:
        """The values of codes qmin and qmax: float32, () or one per channel."""
        assert self.zero_point is not None
        low, high = self.spec.qmin - self.zero_point, self.spec.qmax - self.zero_point
        return low * self.step, high * self.step

    def _nearest_level(self, ratio: Tensor) -> Tensor:
        zero = self._zero(ratio)
        low, high = self.spec.qmin - zero, self.spec.qmax - zero
        scheme = self.spec.scheme
        clamp_first = isinstance(scheme, Uniform) and scheme.clamp_before_round
        if self.rounding is not None:
            return torch.minimum(torch.maximum(ratio.detach().floor() + self.rounding, low), high)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return _rounded(ratio, low, high, into=ratio)  # fresh memory costs more than the arithmetic
        return _NearestInteger.apply(ratio, low, high, clamp_first)  # type: ignore[return-value]

    def _code(self, level: Tensor) -> Tensor:
        return level + self._zero(level)

    def _level(self, code: Tensor) -> Tensor:
        return code - self._zero(code)

    def _zero(self, like: Tensor) -> Tensor:
        assert self.zero_point is not None
        return self._along(self.zero_point, like)


def _rounded(ratio: Tensor, low: Tensor, high: Tensor, into: Tensor | None = None) -> Tensor:
    """The argument rounded and clamped to integers low..high, in the memory of `into`."""
    levels = torch.round(ratio, out=into).add_(0.0)  # + 0 turns -0 into 0, since codes have no -0
    into = None if torch.compiler.is_compiling() else levels  # compilers manage memory themselves
    levels = torch.maximum(levels, low, out=into)  # as clamp_, which takes ten times as long with tensor bounds
    return torch.minimum(levels, high, out=into)


class _NearestInteger(torch.autograd.Function):
    """The argument rounded and clamped to integers low..high, with the gradient of the clamp alone.

    The bounds are integers, so clamping before or after rounding gives the same values; the order decides which
    arguments count as inside. `torch.clamp` is not used under autograd: with tensor bounds it halves the gradient
    of elements that equal a bound, which after rounding are all elements of the first and last level.
    """

    @staticmethod
    def forward(ratio: Tensor, low: Tensor, high: Tensor, clamp_first: bool) -> Tensor:
        return _rounded(ratio, low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ratio, low, high, ctx.clamp_first = inputs
        ctx.save_for_backward(ratio, low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:  # type: ignore[override]
        ratio, low, high = ctx.saved_tensors
        clamped = ratio if ctx.clamp_first else torch.round(ratio)
        below, above = clamped < low, clamped > high
        of_low = (grad * below).sum_to_size(low.shape) if ctx.needs_input_grad[1] else None
        of_high = (grad * above).sum_to_size(high.shape) if ctx.needs_input_grad[2] else None
        return grad * ((clamped >= low) & (clamped <= high)), of_low, of_high, None

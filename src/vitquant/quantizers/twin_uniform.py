"""Fine steps around zero and coarse ones beyond: the scheme `TwinUniform`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitquant.quantizers.quantizer import Quantizer
from vitquant.spec import QuantSpec, TwinUniform


@dataclass(frozen=True)
class TwinLevels:
    """The levels of a `TwinUniform` spec's codes, as integers that count fine steps.

    Half of the codes are fine: zero is in their middle, unless they would then extend beyond the first or last code. Of
    the `zero_point` codes below zero, those beyond the fine half are coarse.

    Arguments:
        fine: the number of codes that are a fine step apart, half of all.
        shift: a coarse step is 2**shift fine ones.
        zero_point: the code of zero, integers of any dtype; may be a tensor, which broadcasts.
    """

    fine: int
    shift: int
    zero_point: Tensor

    @classmethod
    def of(cls, spec: QuantSpec, zero_point: Tensor) -> TwinLevels:
        """The levels of a spec whose scheme is `TwinUniform`."""
        assert isinstance(spec.scheme, TwinUniform)
        return cls(1 << (spec.bits - 1), spec.scheme.shift, zero_point)

    @property
    def span(self) -> int:
        """The largest level minus the smallest: the same wherever zero is."""
        return self.fine - 1 + (self.fine << self.shift)

    @property
    def coarse_below(self) -> Tensor:
        """How many coarse codes come before the fine ones."""
        return (self.zero_point - self.fine // 2).clamp(0, self.fine)

    @property
    def first_fine(self) -> Tensor:
        """The smallest level of the fine half: at most 0."""
        return self.coarse_below - self.zero_point

    @property
    def lowest(self) -> Tensor:
        """The level of code 0."""
        return self.first_fine - self.coarse_below * (1 << self.shift)

    def nearest(self, integers: Tensor) -> Tensor:
        """The level nearest to integers; of two equally near coarse levels the even one, counted from the fine half."""
        within = torch.minimum(torch.maximum(integers, self.lowest), self.lowest + self.span)
        fine = self._nearest_fine(within)
        step = 1 << self.shift
        return fine + torch.round((within - fine) / step) * step

    def code(self, levels: Tensor) -> Tensor:
        """The codes of levels, in their dtype."""
        fine = self._nearest_fine(levels)
        coarse = torch.div(levels - fine, 1 << self.shift, rounding_mode="floor")
        return fine - self.first_fine + self.coarse_below + coarse

    def level(self, codes: Tensor) -> Tensor:
        """The levels of codes, in their dtype."""
        place = codes - self.coarse_below
        fine = place.clamp(0, self.fine - 1)
        return fine + self.first_fine + (place - fine) * (1 << self.shift)

    def _nearest_fine(self, levels: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(levels, self.first_fine), self.first_fine + self.fine - 1)


class TwinUniformQuantizer(Quantizer):
    """Half of the codes are `scale` apart, around zero; the others are `scale * 2**shift` apart, on both sides.

    `x / scale` is rounded to an integer and that integer to the nearest level, halves to even. With two roundings, the
    second is a table lookup in integer arithmetic. Inside `range()` the error is at most half a fine step plus half a
    coarse one. The gradient to x is 1 inside the range and 0 outside.

    Every level is an integer multiple of `scale`, and the levels span (1 + 2**shift) * 2**(bits - 1) - 1 of these: with
    6 bits and shift 2 they fit into 8-bit integers, and a product of two such operands is one integer product with one
    scale.

    Arguments:
        spec: unsigned, asymmetric, at most 8 bits.
        params: scale, the fine step, and zero_point, () or (n,).

    Source: steps a power of two apart, the twin uniform quantization of PTQ4ViT, Yuan et al. 2022; a dense centre and
    sparse tails instead of its two signs, piecewise linear quantization, Fang et al. 2020. docs/twin-steps.md.

    Pitfall: near zero it is as fine as a uniform quantizer with one or two more bits, in the tails it is coarser:
    weights and other values without long tails gain nothing.
    """

    def error_bound(self, x: Tensor) -> Tensor:
        """Half a step, plus half a coarse step outside of the fine levels, plus rounding of arithmetic and cast."""
        step = self.step_along(x.to(torch.promote_types(x.dtype, torch.float32)))
        levels = self._levels(step)
        ratio = torch.round(x.to(step.dtype) / step)
        fine = (ratio >= levels.first_fine) & (ratio < levels.first_fine + levels.fine)
        half = torch.where(fine, 0.5, 0.5 + (1 << levels.shift) / 2).to(step.dtype) * step
        return half + torch.finfo(x.dtype).eps * (x.abs().to(step.dtype) + 2 * half)

    def range(self) -> tuple[Tensor, Tensor]:
        """The values of the first and the last code: float32, () or one per channel."""
        levels = self.levels
        return levels.lowest * self.step, (levels.lowest + levels.span) * self.step

    @property
    def integer_bounds(self) -> tuple[int, int]:
        return 0, self.levels.span

    def integers(self, codes: Tensor) -> Tensor:
        """The levels of codes minus the lowest level, 0 to `levels.span`, in a dtype that holds them."""
        levels = self._levels(codes)
        return levels.level(codes) - levels.lowest

    def codes_of(self, integers: Tensor) -> Tensor:
        levels = self._levels(integers)
        return levels.code(integers + levels.lowest)

    @property
    def levels(self) -> TwinLevels:
        """The levels of the codes: int32, () or one per channel."""
        assert self.zero_point is not None
        return TwinLevels.of(self.spec, self.zero_point)

    def _levels(self, like: Tensor) -> TwinLevels:
        assert self.zero_point is not None
        return TwinLevels.of(self.spec, self._along(self.zero_point, like))

    def _nearest_level(self, ratio: Tensor) -> Tensor:
        return _NearestTwin.apply(ratio, self._levels(ratio))  # type: ignore[return-value]

    def _code(self, level: Tensor) -> Tensor:
        return self._levels(level).code(level)

    def _level(self, code: Tensor) -> Tensor:
        return self._levels(code).level(code)


class _NearestTwin(torch.autograd.Function):
    """The level nearest to the rounded argument, with the gradient of the clamp to the range alone."""

    @staticmethod
    def forward(ratio: Tensor, levels: TwinLevels) -> Tensor:
        return levels.nearest(torch.round(ratio)).add_(0.0)  # + 0 turns -0 into 0, since codes have no -0

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ratio, levels = inputs
        rounded = torch.round(ratio)
        ctx.save_for_backward((rounded >= levels.lowest) & (rounded <= levels.lowest + levels.span))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return grad * inside, None

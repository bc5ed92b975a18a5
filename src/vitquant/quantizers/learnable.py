"""Learned scales, zero points and rounding of weights.

While they are learned, a quantizer computes with tensors that have gradients: `put` gives it those of the current step.
`harden` replaces them by plain buffers, or moves the weight onto the grid, so that a plain quantizer is saved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitquant.errors import CalibrationError
from vitquant.quantizers.parameters import SMALLEST_SCALE
from vitquant.quantizers.quantizer import Quantizer
from vitquant.quantizers.uniform import UniformQuantizer

# AdaRound stretches the sigmoid beyond [0, 1] and clips it, so that 0 and 1 are reached (Nagel et al. 2020, eq. 23).
_STRETCH, _SHIFT = 1.2, -0.1


@dataclass(frozen=True)
class LearnedScale:
    """A scale that is learned as the logarithm of its ratio to the calibrated scale, so that it stays positive.

    The gradient to the logarithm is LSQ's (Esser et al. 2020, equation 3) times the scale.

    Arguments:
        quantizer: the quantizer of the scale.
        calibrated: float32, its scale before learning.
        logarithm: float32, of the same shape; the learned parameter.
    """

    quantizer: Quantizer
    calibrated: Tensor
    logarithm: nn.Parameter

    @classmethod
    def of(cls, quantizer: Quantizer) -> LearnedScale:
        """The learned scale of a quantizer, starting at the scale that it has."""
        return cls(quantizer, quantizer.scale, nn.Parameter(torch.zeros_like(quantizer.scale)))

    def put(self) -> None:
        """Set the quantizer's scale from the current logarithm, with gradients."""
        self.quantizer.scale = (self.calibrated * self.logarithm.exp()).clamp(min=SMALLEST_SCALE)

    def harden(self) -> None:
        """Set the quantizer's scale to the learned one as a plain buffer, without gradients."""
        with torch.no_grad():
            self.put()


@dataclass(frozen=True)
class LearnedZeroPoint:
    """A zero point that is learned as a real number and rounded with a straight-through gradient.

    Only values outside of the range contribute to its gradient: they are clamped to the range's ends, which move with
    it. For a value inside, the shift in encoding and that in decoding cancel.

    Arguments:
        quantizer: uniform.
        position: float32, of the zero point's shape; the learned parameter.
    """

    quantizer: UniformQuantizer
    position: nn.Parameter

    @classmethod
    def of(cls, quantizer: UniformQuantizer) -> LearnedZeroPoint:
        """The learned zero point of a quantizer, starting at the one that it has.

        Raises:
            CalibrationError: the spec is symmetric, and its zero point fixed.
        """
        if quantizer.spec.symmetric or quantizer.zero_point is None:
            raise CalibrationError(f"a zero point of {quantizer.spec} is fixed; learn the scale")
        return cls(quantizer, nn.Parameter(quantizer.zero_point.to(torch.float32)))

    def put(self) -> None:
        """Set the quantizer's zero point to the position, rounded and clamped to the codes, with gradients."""
        spec = self.quantizer.spec
        code = self.position.detach().round().clamp(spec.qmin, spec.qmax)
        self.quantizer.zero_point = code + (self.position - self.position.detach())

    def harden(self) -> None:
        """Set the quantizer's zero point to the nearest integer, as int32 without gradients."""
        with torch.no_grad():
            self.put()
            assert self.quantizer.zero_point is not None
            self.quantizer.zero_point = self.quantizer.zero_point.to(torch.int32)


@dataclass(frozen=True)
class LearnedRounding:
    """Whether each weight is rounded down or up, by a learned number between 0 and 1.

    Source: AdaRound, Nagel et al. 2020, equations 20 to 24.

    Arguments:
        quantizer: of the weight, uniform; its scale is not changed.
        weight: the stored weight.
        offset: float32, of the weight's shape; the learned parameter, before the rectified sigmoid.
    """

    quantizer: UniformQuantizer
    weight: Tensor
    offset: nn.Parameter

    @classmethod
    def of(cls, quantizer: UniformQuantizer, weight: Tensor) -> LearnedRounding:
        """Offsets with which the rounded weight starts at its float value, between two levels."""
        with torch.no_grad():
            ratio = weight.to(torch.float32) / quantizer.step_along(weight.to(torch.float32))
            share = ((ratio - ratio.floor()) - _SHIFT) / _STRETCH
            return cls(quantizer, weight, nn.Parameter(torch.logit(share)))

    def put(self) -> None:
        """Let the quantizer return the level below plus the learned share, with gradients."""
        self.quantizer.rounding = self.share()

    def share(self) -> Tensor:
        """How far each weight goes from the level below towards the level above, 0 to 1."""
        return (self.offset.sigmoid() * _STRETCH + _SHIFT).clamp(0, 1)

    def undecided(self, sharpness: float) -> Tensor:
        """AdaRound's regularizer, the sum of 1 - |2 h - 1|^sharpness: 0 when every offset is 0 or 1 (equation 24)."""
        return (1 - (2 * self.share() - 1).abs() ** sharpness).sum()

    def harden(self) -> None:
        """Set the weight to the level that was chosen, to which plain rounding maps it from now on."""
        with torch.no_grad():
            self.quantizer.rounding = (self.share() >= 0.5).to(torch.float32)
            self.weight.copy_(self.quantizer(self.weight))
            self.quantizer.rounding = None

"""Scales, zero points and the rounding of weights as what gradients change, and as plain numbers again.

While something is learned a quantizer computes with tensors that have gradients: `put` gives it those of the step.
`harden` leaves it with buffers, or the weight with values on the grid, so what is saved is a plain quantizer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitquant.errors import CalibrationError
from vitquant.quantizers.parameters import SMALLEST_SCALE
from vitquant.quantizers.quantizer import Quantizer
from vitquant.quantizers.uniform import UniformQuantizer

# AdaRound's rectified sigmoid ends beyond 0 and 1, so that an offset gets there (Nagel et al. 2020, equation 23).
_STRETCH, _SHIFT = 1.2, -0.1


@dataclass(frozen=True)
class LearnedScale:
    """A scale as a multiple of what was calibrated, by the logarithm of that, so that it stays positive.

    Its gradient is LSQ's (Esser et al. 2020, equation 3), times the scale.

    Arguments:
        quantizer: whose scale it is.
        calibrated: float32, its scale before.
        logarithm: float32, of the same shape; what is learned.
    """

    quantizer: Quantizer
    calibrated: Tensor
    logarithm: nn.Parameter

    @classmethod
    def of(cls, quantizer: Quantizer) -> LearnedScale:
        """The scale that a quantizer has, nothing learned yet."""
        return cls(quantizer, quantizer.scale, nn.Parameter(torch.zeros_like(quantizer.scale)))

    def put(self) -> None:
        """Give the quantizer what the logarithm says now."""
        self.quantizer.scale = (self.calibrated * self.logarithm.exp()).clamp(min=SMALLEST_SCALE)

    def harden(self) -> None:
        """Leave the quantizer with numbers that nothing learns any more."""
        with torch.no_grad():
            self.put()


@dataclass(frozen=True)
class LearnedZeroPoint:
    """A zero point that moves between codes, rounded straight through.

    Its gradient is that of the values beyond the range, which move with its ends; a value within moves with its code
    and back.

    Arguments:
        quantizer: uniform.
        position: float32, of the zero point's shape; what is learned.
    """

    quantizer: UniformQuantizer
    position: nn.Parameter

    @classmethod
    def of(cls, quantizer: UniformQuantizer) -> LearnedZeroPoint:
        """The zero point that a quantizer has, nothing learned yet.

        Raises:
            CalibrationError: the spec is symmetric, and its zero point fixed.
        """
        if quantizer.spec.symmetric or quantizer.zero_point is None:
            raise CalibrationError(f"a zero point of {quantizer.spec} is fixed; learn the scale")
        return cls(quantizer, nn.Parameter(quantizer.zero_point.to(torch.float32)))

    def put(self) -> None:
        """Give the quantizer what the position says now, a whole number among the codes."""
        spec = self.quantizer.spec
        code = self.position.detach().round().clamp(spec.qmin, spec.qmax)
        self.quantizer.zero_point = code + (self.position - self.position.detach())

    def harden(self) -> None:
        """Leave the quantizer with the integer that is nearest."""
        with torch.no_grad():
            self.put()
            assert self.quantizer.zero_point is not None
            self.quantizer.zero_point = self.quantizer.zero_point.to(torch.int32)


@dataclass(frozen=True)
class LearnedRounding:
    """Whether each weight goes to the level below or above it, by a number between 0 and 1 that is learned.

    Source: AdaRound, Nagel et al. 2020, equations 20 to 24.

    Arguments:
        quantizer: the weight's, uniform; its scale stays as it is.
        weight: the stored weight.
        offset: float32, of the weight's shape; what is learned, before the rectified sigmoid.
    """

    quantizer: UniformQuantizer
    weight: Tensor
    offset: nn.Parameter

    @classmethod
    def of(cls, quantizer: UniformQuantizer, weight: Tensor) -> LearnedRounding:
        """Offsets that leave the weight where it is, between its two levels."""
        with torch.no_grad():
            ratio = weight.to(torch.float32) / quantizer.step_along(weight.to(torch.float32))
            share = ((ratio - ratio.floor()) - _SHIFT) / _STRETCH
            return cls(quantizer, weight, nn.Parameter(torch.logit(share)))

    def put(self) -> None:
        """Let the quantizer give the level below plus the offset, with gradients to that."""
        self.quantizer.rounding = self.share()

    def share(self) -> Tensor:
        """How far towards the level above, 0 to 1."""
        return (self.offset.sigmoid() * _STRETCH + _SHIFT).clamp(0, 1)

    def undecided(self, sharpness: float) -> Tensor:
        """AdaRound's regularizer, the sum of 1 - |2 h - 1|^sharpness: 0 when every offset is 0 or 1 (equation 24)."""
        return (1 - (2 * self.share() - 1).abs() ** sharpness).sum()

    def harden(self) -> None:
        """Leave the weight on the level that was decided for, where plain rounding finds it."""
        with torch.no_grad():
            self.quantizer.rounding = (self.share() >= 0.5).to(torch.float32)
            self.weight.copy_(self.quantizer(self.weight))
            self.quantizer.rounding = None

"""The base class of observers, and the reduction of an operand to its extremes."""

from __future__ import annotations

import torch
from torch import Tensor

from vitquant.errors import CalibrationError
from vitquant.quantizers import params_from_range
from vitquant.quantizers.quantizer import channel_axis
from vitquant.spec import Granularity, QParams, QuantSpec


class Observer:
    """Observe an operand batch by batch in bounded memory, then estimate the parameters of its quantizer.

    Arguments:
        spec: of the quantizer.
    """

    def __init__(self, spec: QuantSpec) -> None:
        self.spec = spec
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in one batch: a floating tensor as the reading operation sees it, gradients ignored.

        Raises:
            CalibrationError: `x` holds NaN or infinity.
        """
        raise NotImplementedError

    def estimate(self) -> QParams:
        """The parameters for all values observed so far.

        Raises:
            CalibrationError: nothing was observed.
        """
        return params_from_range(*self.observed_range(), self.spec)

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """The range from which `estimate` computes the parameters: float64, () or one per channel."""
        if self.low is None or self.high is None:
            raise CalibrationError("no calibration data: nothing was observed")
        return self.low, self.high

    def free_range(self) -> tuple[Tensor, Tensor]:
        """The range of a quantizer that need not have a code for zero: float64, () or one per channel."""
        return self.observed_range()


def extremes(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each channel: float64, () or (n,).

    Raises:
        CalibrationError: `x` holds NaN or infinity, either of which shows in its extremes.
    """
    x = x.detach()
    axis = channel_axis(granularity)
    if axis is None:
        low, high = torch.aminmax(x)  # one pass
    else:
        others = [i for i in range(x.ndim) if i != axis % x.ndim]
        low, high = x.amin(others), x.amax(others)  # aminmax over one axis is 6 times slower
    return finite(low, high)


def finite(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Extremes as float64, refused when they show that their tensor holds NaN or infinity."""
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise CalibrationError("NaN or infinity in the calibration data")
    return low.double(), high.double()

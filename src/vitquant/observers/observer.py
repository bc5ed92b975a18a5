"""The base of every observer, and the one place where an operand is reduced to its extremes."""

from __future__ import annotations

import torch
from torch import Tensor

from vitquant.errors import CalibrationError
from vitquant.quantizers import params_from_range
from vitquant.quantizers.quantizer import channel_axis
from vitquant.spec import Granularity, QParams, QuantSpec


class Observer:
    """Watch an operand batch by batch in bounded memory, then give the parameters of its quantizer.

    Arguments:
        spec: what the quantizer will be.
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
        """The parameters for everything seen so far.

        Raises:
            CalibrationError: nothing was seen.
        """
        return params_from_range(*self.observed_range(), self.spec)

    def observed_range(self) -> tuple[Tensor, Tensor]:
        """What `estimate` makes the parameters from: float64, () or one per channel."""
        if self.low is None or self.high is None:
            raise CalibrationError("no calibration data: nothing was observed")
        return self.low, self.high

    def free_range(self) -> tuple[Tensor, Tensor]:
        """The range of a quantizer that need not have a code for zero: float64, () or one per channel."""
        return self.observed_range()


def extremes(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each channel: float64, () or (n,).

    Raises:
        CalibrationError: `x` holds NaN or infinity; either would show in its extremes.
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
    """Extremes as float64, refused when they betray NaN or infinity among what they were taken from."""
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise CalibrationError("NaN or infinity in the calibration data")
    return low.double(), high.double()

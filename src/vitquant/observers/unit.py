"""The fixed range [0, 1] of probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from vitquant.observers.observer import Observer, extremes
from vitquant.quantizers.quantizer import channel_axis
from vitquant.spec import QuantSpec


class Unit(Observer):
    """[0, 1], whatever the data: for the outputs of a softmax. For logarithmic schemes the scale is exactly 1.

    Arguments:
        spec: of the quantizer. With a single scale no data are needed; otherwise one batch is, to count the
            channels.

    Pitfall: nothing checks that the operand stays in [0, 1]; only NaN and infinity are refused.
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        if channel_axis(spec.granularity) is None:
            self.low, self.high = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        low, high = extremes(x, self.spec.granularity)
        self.low, self.high = torch.zeros_like(low), torch.ones_like(high)

"""The exponential moving average of the batches' ranges."""

from __future__ import annotations

import torch
from torch import Tensor

from vitquant.observers.observer import Observer, extremes

MOMENTUM = 0.01


class MovingAverage(Observer):
    """The first batch's range, moved 1 % of the way to the range of every later one.

    Arguments:
        spec: of the quantizer.

    Source: FQ-ViT's code (`observer/ema.py`, sigma = 0.01).

    Pitfall: after 10 batches the first one still has a weight of 91 %, so the order of the data matters.
    """

    def update(self, x: Tensor) -> None:
        low, high = self.batch_range(x)
        self.low = low if self.low is None else torch.lerp(self.low, low, MOMENTUM)
        self.high = high if self.high is None else torch.lerp(self.high, high, MOMENTUM)

    def batch_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The range of one batch: float64, () or one per channel."""
        return extremes(x, self.spec.granularity)

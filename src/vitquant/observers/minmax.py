"""The range of all observed values."""

from __future__ import annotations

import torch
from torch import Tensor

from vitquant.observers.observer import Observer, extremes


class MinMax(Observer):
    """The smallest and the largest value of all batches, whatever the batching.

    Arguments:
        spec: of the quantizer.

    Source: FQ-ViT's code (`observer/minmax.py`).
    """

    def update(self, x: Tensor) -> None:
        low, high = extremes(x, self.spec.granularity)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

"""The base class of observers that try several ranges and take the one with the least squared error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vitquant.observers.histogram import Histogram
from vitquant.observers.observer import Observer, extremes
from vitquant.quantizers import build_quantizer, params_from_range
from vitquant.quantizers.parameters import params_from_free_range
from vitquant.spec import PerAxis, PerTensor, QParams, QuantSpec

Params = Callable[[Tensor, Tensor, QuantSpec], QParams]

BINS = 16384
CHANNEL_BINS = 2048
BLOCK = 1 << 22


class SearchingObserver(Observer):
    """The candidate range with the least squared quantization error of all observed values.

    The error is that of the actual quantizer on the centres of a histogram of all batches, whose bins are
    between range / 16384 and range / 8192 wide (range / 2048 and range / 1024 with one scale per channel).

    Arguments:
        spec: of the quantizer.

    Pitfall: from 12 bits on (9 per channel) steps are as narrow as bins, and the choice means little.
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.histogram = Histogram(BINS if isinstance(spec.granularity, PerTensor) else CHANNEL_BINS)
        self._best: dict[Params, tuple[Tensor, Tensor]] = {}  # cached until the next update: the search takes long

    def update(self, x: Tensor) -> None:
        low, high = extremes(x, self.spec.granularity)
        self.histogram.update(x.detach(), low, high, self.spec.granularity)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self._best = {}

    def observed_range(self) -> tuple[Tensor, Tensor]:
        return self._best_with(params_from_range)

    def free_range(self) -> tuple[Tensor, Tensor]:
        return self._best_with(params_from_free_range)

    def _best_with(self, params: Params) -> tuple[Tensor, Tensor]:
        whole, _ = super().observed_range()
        if params not in self._best:
            ranges = self.candidates()
            best = self.errors(params, ranges).argmin(0, keepdim=True)
            low, high = (each.gather(0, best).view(whole.shape) for each in ranges)
            self._best[params] = low, high
        return self._best[params]

    def candidates(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value of each range that is tried: float64 (candidates, channels)."""
        raise NotImplementedError

    def errors(self, params: Params = params_from_range, ranges: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The sum of squared errors of every candidate: float64 (candidates, channels).

        Arguments:
            params: the function that computes a quantizer's parameters from a range.
            ranges: the candidates if they are known, see `candidates`.
        """
        lows, highs = self.candidates() if ranges is None else ranges
        centers, counts = self.histogram.centers(), self.histogram.counts
        channels = max(1, BLOCK // (len(lows) * self.histogram.bins))  # channels at once, which bounds the memory
        found = []
        for start in range(0, len(counts), channels):
            part = slice(start, start + channels)
            x, weights = _occupied(centers[part], counts[part])
            found.append(candidate_errors(lows[:, part], highs[:, part], x, weights, self.spec, params))
        return torch.cat(found, dim=1)


def _occupied(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The fullest bins of each channel, as many as the most that any channel occupies; a weight leaves most empty."""
    used = int((counts > 0).sum(dim=1).amax())
    kept = counts.topk(used, dim=1).indices
    return x.gather(1, kept), counts.gather(1, kept)


def candidate_errors(
    lows: Tensor, highs: Tensor, x: Tensor, counts: Tensor, spec: QuantSpec, params: Params = params_from_range
) -> Tensor:
    """The sum of counts * (quantized x - x)**2 for each candidate range.

    Arguments:
        lows, highs: float64 (candidates, channels).
        x, counts: (channels, n).
        spec: of the quantizer; its granularity is ignored.
        params: the function that computes its parameters from a range.

    Returns:
        float64 (candidates, channels).
    """
    spec = replace(spec, granularity=PerAxis(0))  # every candidate of every channel is a channel
    quantizer = build_quantizer(spec, params(lows.flatten(), highs.flatten(), spec))
    x = x.repeat(len(lows), 1)
    error = (quantizer(x) - x).square_().view(len(lows), *counts.shape)
    return error.mul_(counts).sum(dim=-1, dtype=torch.float64)

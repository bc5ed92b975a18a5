"""The range that quantizes everything seen with the least squared error."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vitquant.errors import RecipeError
from vitquant.observers.histogram import Histogram
from vitquant.observers.observer import Observer, extremes
from vitquant.quantizers import build_quantizer, params_from_range
from vitquant.spec import PerAxis, PerTensor, PowerOfTwoScale, QuantSpec, Uniform

STEPS = 90
BINS = 16384
CHANNEL_BINS = 2048
BLOCK = 1 << 22


class Omse(Observer):
    """The extremes shrunk jointly by the factor among 1.00, 0.99 .. 0.11 with the least squared error.

    The error is that of the real quantizer on the centres of a histogram of all batches, whose bins are
    between range / 16384 and range / 8192 wide (range / 2048 and range / 1024 with one scale per channel).

    Arguments:
        spec: what the quantizer will be: `Uniform` or `PowerOfTwoScale`.

    Raises:
        RecipeError: another scheme, which has no range to shrink.

    Source: FQ-ViT's code (`observer/omse.py`), which scores the last batch only and fits a weight to the
    activation when used for weights; here every batch counts, and a weight is fitted to itself.

    Pitfall: from 12 bits on (9 per channel) steps are as narrow as bins, and the choice means little.
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        if not isinstance(spec.scheme, Uniform | PowerOfTwoScale):
            raise RecipeError("omse shrinks the range of a uniform scheme: choose another observer")
        self.histogram = Histogram(BINS if isinstance(spec.granularity, PerTensor) else CHANNEL_BINS)
        self._best: Tensor | None = None  # factors for what was seen, which take longer to find than to use

    def update(self, x: Tensor) -> None:
        low, high = extremes(x, self.spec.granularity)
        self.histogram.update(x.detach(), low, high, self.spec.granularity)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self._best = None

    def observed_range(self) -> tuple[Tensor, Tensor]:
        low, high = super().observed_range()
        if self._best is None:
            self._best = shrink_factors(low.device)[self.errors().argmin(0)].view(low.shape)
        return low * self._best, high * self._best

    def errors(self) -> Tensor:
        """The sum of squared errors of every candidate: float64 (90, channels), the whole range first."""
        low, high = super().observed_range()
        per_channel = (low.view(-1), high.view(-1), self.histogram.centers(), self.histogram.counts)
        channels = max(1, BLOCK // (STEPS * self.histogram.bins))  # at once: bounds the memory
        blocks = (
            [values[start : start + channels] for values in per_channel] for start in range(0, low.numel(), channels)
        )
        return torch.cat([candidate_errors(*_occupied(*block), spec=self.spec) for block in blocks], dim=1)


def _occupied(low: Tensor, high: Tensor, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As many of the fullest bins as the fullest channel needs: a weight's row leaves most of them empty."""
    used = int((counts > 0).sum(dim=1).amax())
    kept = counts.topk(used, dim=1).indices
    return low, high, x.gather(1, kept), counts.gather(1, kept)


def shrink_factors(device: torch.device) -> Tensor:
    """1.00, 0.99 .. 0.11 as float64."""
    return 1.0 - 0.01 * torch.arange(STEPS, dtype=torch.float64, device=device)


def candidate_errors(low: Tensor, high: Tensor, x: Tensor, counts: Tensor, spec: QuantSpec) -> Tensor:
    """The sum of counts * (quantized x - x)**2 for [low, high] shrunk by every factor.

    Arguments:
        low, high: float64 (channels,).
        x, counts: (channels, n).
        spec: of the quantizer; its granularity is not looked at.

    Returns:
        float64 (90, channels).
    """
    factors = shrink_factors(low.device)[:, None]
    spec = replace(spec, granularity=PerAxis(0))  # every candidate of every channel is a channel
    quantizer = build_quantizer(spec, params_from_range((factors * low).flatten(), (factors * high).flatten(), spec))
    x = x.repeat(STEPS, 1)
    error = (quantizer(x) - x).square_().view(STEPS, *counts.shape)
    return error.mul_(counts).sum(dim=-1, dtype=torch.float64)

"""A histogram per channel that grows with its data and never loses a count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitquant.quantizers.quantizer import along_axis
from vitquant.spec import Granularity

SMALLEST_EXPONENT = -126  # bins are no narrower than float32's smallest normal number
BLOCK = 1 << 17


class Histogram:
    """Counts over `bins` bins per channel that cover zero and all values seen.

    Bin j is [j * width, (j + 1) * width), and the width is the smallest power of two with which the bins
    cover the range seen so far, so between half of the bins and all of them are in use. When the range
    grows, pairs of bins merge exactly: the counts are those that all the data at once would give,
    however it was split into batches.

    Arguments:
        bins: the number of bins per channel.
    """

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.counts = torch.zeros(0)  # int64 (channels, bins)
        self.exponent = torch.zeros(0)  # int64 (channels,): width = 2**exponent
        self.first = torch.zeros(0)  # int64 (channels,): j of the window's first bin
        self.low = self.high = torch.zeros(0)  # float64 (channels,)

    def update(self, x: Tensor, low: Tensor, high: Tensor, granularity: Granularity) -> None:
        """Count one batch.

        Arguments:
            x: finite, of any floating dtype.
            low, high: the extremes of `x`: float64, () or (n,).
            granularity: the axis of the channels.
        """
        self._grow(low.view(-1), high.view(-1))
        dtype = torch.promote_types(x.dtype, torch.float32)
        start = torch.arange(len(self.first), device=x.device) * self.bins - self.first
        offset = along_axis(start.to(torch.int32), granularity, x.ndim)
        per_width = along_axis(torch.exp2(-self.exponent.double()).to(dtype), granularity, x.ndim)
        # A single channel is counted block by block, so that each block stays in the cache.
        for part in x.flatten().split(BLOCK) if len(self.first) == 1 else (x,):
            bin_index = (part.to(dtype) * per_width).floor_().to(torch.int32).add_(offset)
            self.counts += torch.bincount(bin_index.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def centers(self) -> Tensor:
        """The middle of every bin: float32 (channels, bins), exact."""
        return self._centers_of(torch.arange(self.bins, device=self.first.device))

    def quantiles(self, shares: Sequence[float]) -> Tensor:
        """Some quantiles of each channel's values: float64 (shares, channels).

        They are interpolated linearly at position (n - 1) * share between the two neighbouring values, each of which is
        taken as the centre of its bin.
        """
        cumulated = self.counts.cumsum(dim=1)
        position = (cumulated[:, -1:] - 1).double() * torch.tensor(shares, dtype=torch.float64, device=cumulated.device)
        below, above = (
            self._centers_of(torch.searchsorted(cumulated, index.long() + 1)).double()
            for index in (position.floor(), position.ceil())
        )
        return torch.lerp(below, above, position - position.floor()).T

    def _centers_of(self, bins: Tensor) -> Tensor:
        """The middle of some bins of the window: float32 (channels, ...), exact."""
        return ((self.first[:, None] + bins + 0.5) * torch.exp2(self.exponent.double())[:, None]).to(torch.float32)

    def _grow(self, low: Tensor, high: Tensor) -> None:
        """Widen the window of bins so that it covers [low, high] too."""
        if not len(self.counts):
            self.counts = torch.zeros(len(low), self.bins, dtype=torch.int64, device=low.device)
            self.low, self.high = low.clamp(max=0.0), high.clamp(min=0.0)
            self.exponent, self.first = self._window()
            return
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        exponent, first = self._window()
        j = self.first[:, None] + torch.arange(self.bins, device=low.device)
        merged = j >> (exponent - self.exponent).clamp(max=63)[:, None]  # floor(j / 2**growth)
        index = (merged - first[:, None]).clamp(0, self.bins - 1)  # only empty bins are ever clamped
        self.counts = torch.zeros_like(self.counts).scatter_add_(1, index, self.counts)
        self.exponent, self.first = exponent, first

    def _window(self) -> tuple[Tensor, Tensor]:
        """The exponent of the bins' width and the number of the first bin, as functions of the range alone."""
        span = self.high - self.low
        exponent = torch.where(span > 0, torch.frexp(span / self.bins).exponent, SMALLEST_EXPONENT)
        exponent = exponent.clamp(min=SMALLEST_EXPONENT).to(torch.int64)
        used = self._bin(self.high, exponent) - self._bin(self.low, exponent) + 1
        exponent = exponent + (used > self.bins)  # depending on where it starts, the range can touch one more bin
        return exponent, self._bin(self.low, exponent)

    @staticmethod
    def _bin(x: Tensor, exponent: Tensor) -> Tensor:
        return torch.floor(x * torch.exp2(-exponent.double())).to(torch.int64)

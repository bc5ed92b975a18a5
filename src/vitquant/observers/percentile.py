"""The range between two fixed quantiles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitquant.observers.moving_average import MovingAverage
from vitquant.observers.observer import finite
from vitquant.quantizers.quantizer import channel_axis
from vitquant.spec import QuantSpec

ALPHA = 0.99999
CHUNK = 512


class Percentile(MovingAverage):
    """The moving average over batches of the quantiles 1 - alpha and alpha of each channel.

    The quantiles are exact, interpolated linearly at position (n - 1) * alpha as numpy and torch do, and
    cost about twice what the extremes do: see `tails`.

    Arguments:
        spec: of the quantizer.
        alpha: the upper quantile, above 1/2.

    Source: FQ-ViT's code (`observer/percentile.py`, alpha = 0.99999, sigma = 0.01).

    Pitfalls:
        In a channel of fewer than about 1 / (1 - alpha) values the extremes are trimmed only by a fraction of the
        distance to the next value; per channel this is then close to "moving-average".
        With one scale per channel the operand is copied, to lay out each channel in one row.
    """

    def __init__(self, spec: QuantSpec, alpha: float = ALPHA) -> None:
        super().__init__(spec)
        self.alpha = alpha

    def batch_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach()
        axis = channel_axis(self.spec.granularity)
        rows = x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)
        position = (rows.shape[1] - 1) * self.alpha
        count = rows.shape[1] - math.floor(position)  # number of values from the quantile's inner neighbour outwards
        bottom, top = tails(rows, count)
        finite(bottom[:, 0], top[:, 0])
        fraction = position - math.floor(position)
        low, high = (torch.lerp(t[:, -1].double(), t[:, max(count - 2, 0)].double(), fraction) for t in (bottom, top))
        return (low[0], high[0]) if axis is None else (low, high)


def tails(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` smallest and the `count` largest values of each row, outermost first, without sorting the row.

    A row is cut into chunks: the `count` chunks with the largest maxima hold `count` values that no value
    of any other chunk exceeds, so the row's largest are among them. One pass finds the maxima, after which a
    few thousand values remain to be searched.

    Arguments:
        rows: (channels, n).
        count: 1 to n.

    Returns:
        Two tensors (channels, count); NaN counts as the largest value.
    """
    whole = rows.shape[1] // CHUNK * CHUNK
    chunks, rest = rows[:, :whole].unflatten(1, (-1, CHUNK)), rows[:, whole:]

    def outermost(peaks: Tensor, largest: bool) -> Tensor:
        chosen = peaks.topk(min(count, peaks.shape[1]), dim=1, largest=largest, sorted=False).indices
        candidates = chunks.gather(1, chosen[:, :, None].expand(-1, -1, CHUNK)).flatten(1)
        return torch.cat((candidates, rest), dim=1).topk(count, dim=1, largest=largest).values

    pieces = [(piece.amin(2), piece.amax(2)) for piece in chunks.split(512, dim=1)]  # each piece stays in the cache
    lowest, highest = (torch.cat(peaks, dim=1) for peaks in zip(*pieces, strict=True))
    return outermost(lowest, largest=False), outermost(highest, largest=True)

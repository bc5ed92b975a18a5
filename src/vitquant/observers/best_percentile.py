"""The range between two quantiles that are chosen by squared error."""

from __future__ import annotations

from torch import Tensor

from vitquant.errors import RecipeError
from vitquant.observers.observer import Observer
from vitquant.observers.searching import SearchingObserver
from vitquant.spec import PowerOfTwoFactor, QuantSpec

QUANTILES = (0.999, 0.9999, 0.99999)


class BestPercentile(SearchingObserver):
    """The quantiles 1 - q and q with the least squared error, for q among 0.999, 0.9999 and 0.99999.

    Quantiles are interpolated linearly at position (n - 1) * q between order statistics, which are taken from the
    histogram and are off by at most half a bin.

    Arguments:
        spec: of the quantizer, with any scheme but `PowerOfTwoFactor`.

    Raises:
        RecipeError: the scheme is `PowerOfTwoFactor`, whose channels share a range.

    Source: RepQ-ViT's code (`quant/quantizer.py`, `init_quantization_scale`), which reads quantiles from the one batch
    of 32 images that it calibrates on, and does not make the range include zero.

    Pitfall: see `SearchingObserver`. In a channel of fewer than 1,000 values, as in a weight, the extremes are trimmed
    only by a fraction of the distance to the next value.
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        if isinstance(spec.scheme, PowerOfTwoFactor):
            raise RecipeError("best-percentile gives each channel a range of its own: choose another observer")

    def candidates(self) -> tuple[Tensor, Tensor]:
        low, high = (each.view(-1) for each in Observer.observed_range(self))
        found = self.histogram.quantiles([*(1 - q for q in QUANTILES), *QUANTILES]).clamp(low, high)
        return found[: len(QUANTILES)], found[len(QUANTILES) :]

"""The extremes shrunk to the range with the least squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from vitquant.errors import RecipeError
from vitquant.observers.observer import Observer
from vitquant.observers.searching import SearchingObserver
from vitquant.spec import PowerOfTwoScale, QuantSpec, Uniform

STEPS = 90


class Omse(SearchingObserver):
    """The extremes shrunk jointly by the factor among 1.00, 0.99 .. 0.11 with the least squared error.

    Arguments:
        spec: of the quantizer, with scheme `Uniform` or `PowerOfTwoScale`.

    Raises:
        RecipeError: another scheme, which has no range to shrink.

    Source: FQ-ViT's code (`observer/omse.py`), which measures the error on the last batch only and, for weights,
    on the activation; here the error is that of all batches, and for weights that of the weight itself.

    Pitfall: see `SearchingObserver`.
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        if not isinstance(spec.scheme, Uniform | PowerOfTwoScale):
            raise RecipeError("omse shrinks the range of a uniform scheme: choose another observer")

    def candidates(self) -> tuple[Tensor, Tensor]:
        low, high = Observer.observed_range(self)
        factors = shrink_factors(low.device)[:, None]
        return factors * low.view(-1), factors * high.view(-1)


def shrink_factors(device: torch.device) -> Tensor:
    """1.00, 0.99 .. 0.11 as float64."""
    return 1.0 - 0.01 * torch.arange(STEPS, dtype=torch.float64, device=device)

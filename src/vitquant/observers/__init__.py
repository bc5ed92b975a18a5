"""Observers, which estimate quantization parameters from calibration data, one estimator per file."""

from __future__ import annotations

from vitquant.errors import RecipeError
from vitquant.observers.best_percentile import BestPercentile
from vitquant.observers.minmax import MinMax
from vitquant.observers.moving_average import MovingAverage
from vitquant.observers.mse import Omse
from vitquant.observers.observer import Observer
from vitquant.observers.percentile import Percentile
from vitquant.observers.unit import Unit
from vitquant.spec import QuantSpec

__all__ = ["OBSERVERS", "Observer", "build_observer"]

OBSERVERS = ("minmax", "moving-average", "percentile", "omse", "best-percentile", "unit")


def build_observer(name: str, spec: QuantSpec) -> Observer:
    """A fresh observer by the name that recipes use, one of `OBSERVERS`.

    Raises:
        RecipeError: no observer has this name, or it cannot serve `spec`.
    """
    match name:
        case "minmax":
            return MinMax(spec)
        case "moving-average":
            return MovingAverage(spec)
        case "percentile":
            return Percentile(spec)
        case "omse":
            return Omse(spec)
        case "best-percentile":
            return BestPercentile(spec)
        case "unit":
            return Unit(spec)
        case _:
            raise RecipeError(f'observer = "{name}": choose one of {", ".join(OBSERVERS)}')

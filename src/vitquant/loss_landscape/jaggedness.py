"""How jagged a curve is, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Jaggedness:
    """The lowest point of a curve, and how jagged the curve is.

    Arguments:
        lowest: the lowest value.
        at: the position of it; the first of several.
        spread: the largest value less the lowest.
        minima: how many values, or runs of equal values, are lower than their neighbours on both sides; the ends are
            not counted.
        variation: the sum of the absolute differences of neighbours over the spread: 1 for a curve that only falls or
            only rises, 2 for a valley between equal heights, more for a jagged one, 0 for a constant one.
    """

    lowest: float
    at: float
    spread: float
    minima: int
    variation: float


def jaggedness(positions: Sequence[float], values: Sequence[float | None]) -> Jaggedness | None:
    """The jaggedness of a curve; None if it has no points.

    Arguments:
        positions: of the points, ascending.
        values: None where there is no point.
    """
    known = [(value, at) for at, value in zip(positions, values, strict=True) if value is not None]
    if not known:
        return None
    heights = [value for value, _ in known]
    lowest, at = min(known)
    spread = max(heights) - lowest
    total = sum(abs(after - before) for before, after in pairwise(heights))
    levels = [heights[0], *(after for before, after in pairwise(heights) if after != before)]
    minima = sum(levels[i - 1] > levels[i] < levels[i + 1] for i in range(1, len(levels) - 1))
    return Jaggedness(lowest, at, spread, minima, total / spread if spread > 0 else 0.0)

"""Lines through the scales of a block, as points that a search could have tried."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from vitquant.search.genes import Genes, mutation

BEFORE, BEHIND = -1, 2  # the ends of a searched line; the start is at 0, what was found at 1


@dataclass(frozen=True)
class Line:
    """Points along a line.

    Arguments:
        name: of the line.
        positions: t of each point, ascending; 0 is among them.
        points: float64 (points, n), within the limits of the genes.
    """

    name: str
    positions: tuple[float, ...]
    points: Tensor


def random_line(name: str, genes: Genes, reach: float, count: int, generator: torch.Generator) -> Line:
    """A line on which every scale s becomes s (1 + t u), with a u of its own, uniform in [-1, 1].

    Integers, and scales that a search leaves as they are, stay.

    Arguments:
        genes: of a block.
        reach: t is between its negative and it; below 1.
        count: the number of points, before 0 is added where it is not among them.
        generator: of u, on the CPU.
    """
    moves = mutation(len(genes.start), 1.0, generator) * genes.start
    moves = torch.where(genes.whole | (genes.reach == 0), torch.zeros_like(moves), moves)
    positions = tuple(reach * float(share) for share in _even(-1, 1, count, (0,)))
    return Line(name, positions, _points(genes, moves, positions))


def searched_line(name: str, genes: Genes, found: Tensor, count: int) -> Line:
    """The line from the start of a search to what it found: start + t (found - start), with t from -1 to 2.

    Arguments:
        genes: of a block.
        found: float64 (n,), numbers within the limits of the genes.
        count: the number of points, before 0 and 1 are added where they are not among them.
    """
    positions = tuple(map(float, _even(BEFORE, BEHIND, count, (0, 1))))
    points = _points(genes, found - genes.start, positions)
    points[positions.index(1.0)] = found  # without the rounding of the sum
    return Line(name, positions, points)


def _even(first: int, last: int, count: int, wanted: tuple[int, ...]) -> list[Fraction]:
    """Evenly spaced numbers, with some that have to be among them."""
    spaced = {first + Fraction((last - first) * place, count - 1) for place in range(count)}
    return sorted(spaced | {Fraction(each) for each in wanted})


def _points(genes: Genes, moves: Tensor, positions: tuple[float, ...]) -> Tensor:
    t = torch.tensor(positions, dtype=torch.float64).unsqueeze(1)
    points = genes.start + t * moves
    points = torch.where(genes.whole, points.round(), points)
    return torch.minimum(torch.maximum(points, genes.low), genes.high)

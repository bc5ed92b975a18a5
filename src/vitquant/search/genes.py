"""The numbers that a search by ask and tell moves, and what all such searches share.

They know nothing of what the numbers mean. Lower fitness is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Genes:
    """The numbers that a search moves, and how far one step may move each.

    Arguments:
        start: float64 (n,), with which the search begins.
        reach: float64 (n,), the most by which a step moves the number.
        relative: bool (n,), whether the reach is a share of the number, rather than an amount.
        whole: bool (n,), whether the number is an integer: then the amount is rounded, and a uniform mutation with a
            reach of 1 moves every fourth number up and every fourth down.
        low, high: float64 (n,), the smallest and the largest number. A number that a step moves below `low` is
            reflected there, and one above `high` is set to it.
        coordinate: int64 (n,), numbers of the same coordinate move together where one coordinate moves at a time.
    """

    start: Tensor
    reach: Tensor
    relative: Tensor
    whole: Tensor
    low: Tensor
    high: Tensor
    coordinate: Tensor


class Search(Protocol):
    """A search by ask and tell. Of members with the same fitness the older is the best."""

    def ask(self) -> Tensor:
        """Numbers whose fitness is wanted: float64 (n,)."""
        ...

    def tell(self, child: Tensor, fitness: float) -> None:
        """Take note of a fitness.

        Arguments:
            child: float64 (n,), from the last `ask`.
            fitness: what it was found to have; NaN is the worst.
        """
        ...

    @property
    def best(self) -> tuple[Tensor, float]:
        """The fittest numbers so far, float64 (n,), and their fitness."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on beside the arguments, as tensors by name."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave, for the same arguments.

        Arguments:
            state: its tensors have the shapes and dtypes of those of `state`; what they hold is checked.

        Raises:
            ValueError: no search with these arguments has such a state.
        """
        ...


def moved(genes: Genes, parent: Tensor, steps: Tensor) -> Tensor:
    """Numbers after a step of each.

    Arguments:
        parent: float64 (n,), within the limits of the genes.
        steps: float64 (n,), as shares of the reach, from -1 to 1.
    """
    moves = steps * genes.reach
    moves = torch.where(genes.relative, moves * parent, moves)
    moves = torch.where(genes.whole, moves.round(), moves)
    child = torch.minimum(genes.low + (parent + moves - genes.low).abs(), genes.high)
    return torch.where(moves == 0, parent, child)  # without the rounding of the sums


def mutation(count: int, rate: float, generator: torch.Generator) -> Tensor:
    """Uniform steps from -1 to 1, float64 (count,); a number moves with the probability `rate`."""
    steps = uniform(count, generator).mul(2).sub(1)
    return steps if rate == 1 else steps * (uniform(count, generator) < rate)


def uniform(count: int, generator: torch.Generator) -> Tensor:
    """Float64 (count,), uniform in [0, 1)."""
    return torch.rand(count, dtype=torch.float64, generator=generator)


def within(genes: Genes, members: Tensor) -> bool:
    """Whether numbers, float64 (..., n), lie within the limits of genes and are integers where they have to be."""
    whole = members[..., genes.whole]
    inside = (members >= genes.low) & (members <= genes.high)
    return bool(inside.all()) and torch.equal(whole, whole.round())


def ordered(fitness: float) -> float:
    """A fitness that can be compared: infinity in place of NaN."""
    return math.inf if math.isnan(fitness) else fitness


def set_state(generator: torch.Generator, state: Tensor) -> None:
    """Set the state of a generator.

    Raises:
        ValueError: it is none.
    """
    try:
        generator.set_state(state)
    except RuntimeError as refused:
        raise ValueError("the state of the generator is none") from refused

"""Evolutionary search by ask and tell: children of the fittest, by uniform mutation, replace the least fit.

It knows nothing of what its numbers mean. Lower fitness is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Genes:
    """The numbers that evolve, and how far one mutation may move each.

    Arguments:
        start: float64 (n,), with which the search begins.
        reach: float64 (n,), half the width of the uniform mutation.
        relative: bool (n,), whether the reach is a share of the number, rather than an amount.
        whole: bool (n,), whether the number is an integer: then the amount is rounded, and a reach of 1 moves every
            fourth number up and every fourth down.
        low, high: float64 (n,), the smallest and the largest number. A number that a mutation moves below `low` is
            reflected there, and one above `high` is set to it.
    """

    start: Tensor
    reach: Tensor
    relative: Tensor
    whole: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class EvolutionSettings:
    """The size of the population and of its samples.

    Arguments:
        population: the number of members.
        sample: how many of them are drawn, with replacement, for the fittest to be the parent.
        rate: the probability with which a number is mutated.
    """

    population: int = 15
    sample: int = 10
    rate: float = 1.0


class Evolution:
    """A population that begins with copies of the start, and its random generator.

    Of members with the same fitness the older is preferred, both as a parent and to stay: without a gain nothing
    changes.

    Arguments:
        genes: what evolves.
        fitness: of the start.
        settings: see `EvolutionSettings`.
        generator: of all random draws; on the CPU.

    Source: Evol-Q, Frumkin et al. 2023, algorithm 1: population 15, sample 10, every number mutated.
    """

    def __init__(self, genes: Genes, fitness: float, settings: EvolutionSettings, generator: torch.Generator) -> None:
        self._genes, self._settings = genes, settings
        self._members = genes.start.repeat(settings.population, 1)
        self._fitness = torch.full((settings.population,), _ordered(fitness), dtype=torch.float64)
        self._age = torch.arange(settings.population)  # the number of members made before this one
        self._generator = generator

    def ask(self) -> Tensor:
        """A child: float64 (n,)."""
        drawn = self._random(self._settings.sample).mul(len(self._members)).long()
        parent = self._members[self._first(drawn)]
        genes, moves = self._genes, self._random(len(parent)).mul(2).sub(1) * self._genes.reach
        moves = torch.where(genes.relative, moves * parent, moves)
        moves = torch.where(genes.whole, moves.round(), moves)
        if self._settings.rate < 1:
            moves = moves * (self._random(len(parent)) < self._settings.rate)
        child = genes.low + (parent + moves - genes.low).abs()
        return torch.minimum(child, genes.high)

    def tell(self, child: Tensor, fitness: float) -> None:
        """Add a child, and drop the least fit member.

        Arguments:
            child: float64 (n,), from `ask`.
            fitness: what it was found to have; NaN is the worst.
        """
        fitnesses = torch.cat([self._fitness, torch.tensor([_ordered(fitness)], dtype=torch.float64)])
        ages = torch.cat([self._age, self._age.max().add(1).view(1)])
        members = torch.cat([self._members, child.view(1, -1)])
        worst = int(torch.where(fitnesses == fitnesses.max(), ages, -1).argmax())
        kept = torch.arange(len(members)) != worst
        self._members, self._fitness, self._age = members[kept], fitnesses[kept], ages[kept]

    @property
    def best(self) -> tuple[Tensor, float]:
        """The fittest member, float64 (n,), and its fitness; of equals the oldest."""
        place = self._first(torch.arange(len(self._members)))
        return self._members[place], float(self._fitness[place])

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on beside the arguments, as tensors by name."""
        return {
            "members": self._members.clone(),
            "fitness": self._fitness.clone(),
            "age": self._age.clone(),
            "generator": self._generator.get_state(),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave, for the same arguments.

        Arguments:
            state: its tensors have the shapes and dtypes of those of `state`; what they hold is checked.

        Raises:
            ValueError: no evolution with these arguments has such a state.
        """
        members, fitness, age = (state[name].clone() for name in ("members", "fitness", "age"))
        if not within(self._genes, members) or len(age.unique()) < len(age) or bool((age < 0).any()):
            raise ValueError("no evolution of these genes has such members or ages")
        try:
            self._generator.set_state(state["generator"])
        except RuntimeError as refused:
            raise ValueError("the state of the generator is none") from refused
        self._members, self._fitness, self._age = members, fitness, age

    def _random(self, count: int) -> Tensor:
        """Float64 (count,), uniform in [0, 1)."""
        return torch.rand(count, dtype=torch.float64, generator=self._generator)

    def _first(self, places: Tensor) -> int:
        """The place of the fittest among some members, the oldest of equals."""
        fitness = self._fitness[places]
        ages = torch.where(fitness == fitness.min(), self._age[places], torch.iinfo(torch.int64).max)
        return int(places[ages.argmin()])


def within(genes: Genes, members: Tensor) -> bool:
    """Whether numbers, float64 (..., n), lie within the limits of genes and are integers where they have to be."""
    whole = members[..., genes.whole]
    inside = (members >= genes.low) & (members <= genes.high)
    return bool(inside.all()) and torch.equal(whole, whole.round())


def _ordered(fitness: float) -> float:
    return math.inf if math.isnan(fitness) else fitness

"""Evolutionary search: children of the fittest, by uniform mutation, replace the least fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vitquant.search.genes import Genes, moved, mutation, ordered, set_state, uniform, within


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
        self._fitness = torch.full((settings.population,), ordered(fitness), dtype=torch.float64)
        self._age = torch.arange(settings.population)  # the number of members made before this one
        self._generator = generator

    def ask(self) -> Tensor:
        """A child of the fittest of a sample; see `Search`."""
        drawn = uniform(self._settings.sample, self._generator).mul(len(self._members)).long()
        parent = self._members[self._first(drawn)]
        return moved(self._genes, parent, mutation(len(parent), self._settings.rate, self._generator))

    def tell(self, child: Tensor, fitness: float) -> None:
        """Add a child, and drop the least fit member; see `Search`."""
        fitnesses = torch.cat([self._fitness, torch.tensor([ordered(fitness)], dtype=torch.float64)])
        ages = torch.cat([self._age, self._age.max().add(1).view(1)])
        members = torch.cat([self._members, child.view(1, -1)])
        worst = int(torch.where(fitnesses == fitnesses.max(), ages, -1).argmax())
        kept = torch.arange(len(members)) != worst
        self._members, self._fitness, self._age = members[kept], fitnesses[kept], ages[kept]

    @property
    def best(self) -> tuple[Tensor, float]:
        """See `Search`."""
        place = self._first(torch.arange(len(self._members)))
        return self._members[place], float(self._fitness[place])

    def state(self) -> dict[str, Tensor]:
        """See `Search`."""
        return {
            "members": self._members.clone(),
            "fitness": self._fitness.clone(),
            "age": self._age.clone(),
            "generator": self._generator.get_state(),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Search`."""
        members, fitness, age = (state[name].clone() for name in ("members", "fitness", "age"))
        if not within(self._genes, members) or len(age.unique()) < len(age) or bool((age < 0).any()):
            raise ValueError("no evolution of these genes has such members or ages")
        set_state(self._generator, state["generator"])
        self._members, self._fitness, self._age = members, fitness, age

    def _first(self, places: Tensor) -> int:
        """The place of the fittest among some members, the oldest of equals."""
        fitness = self._fitness[places]
        ages = torch.where(fitness == fitness.min(), self._age[places], torch.iinfo(torch.int64).max)
        return int(places[ages.argmin()])

"""Random search: every child is a mutation of the start, and the fittest is kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vitquant.search.genes import Genes, moved, mutation, ordered, set_state, within


class RandomSearch:
    """Children around the start, whatever was found before: what an evolution has to be better than.

    Arguments:
        genes: what is searched.
        fitness: of the start.
        generator: of all random draws; on the CPU.
        rate: the probability with which a number is moved.
    """

    def __init__(self, genes: Genes, fitness: float, generator: torch.Generator, rate: float = 1.0) -> None:
        self._genes, self._rate, self._generator = genes, rate, generator
        self._best, self._fitness = genes.start.clone(), ordered(fitness)

    def ask(self) -> Tensor:
        """See `Search`."""
        start = self._genes.start
        return moved(self._genes, start, mutation(len(start), self._rate, self._generator))

    def tell(self, child: Tensor, fitness: float) -> None:
        """See `Search`."""
        if ordered(fitness) < self._fitness:
            self._best, self._fitness = child.clone(), fitness

    @property
    def best(self) -> tuple[Tensor, float]:
        """See `Search`."""
        return self._best, self._fitness

    def state(self) -> dict[str, Tensor]:
        """See `Search`."""
        fitness = torch.tensor([self._fitness], dtype=torch.float64)
        return {"best": self._best.clone(), "fitness": fitness, "generator": self._generator.get_state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Search`."""
        if not within(self._genes, state["best"]):
            raise ValueError("no search of these genes finds such numbers")
        set_state(self._generator, state["generator"])
        self._best, self._fitness = state["best"].clone(), float(state["fitness"])

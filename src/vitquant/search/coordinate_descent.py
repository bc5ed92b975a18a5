"""Coordinate descent: move one coordinate after another up or down, and keep what is fitter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vitquant.search.genes import Genes, moved, ordered, within


class CoordinateDescent:
    """Tries for each coordinate a step up and, unless that was a gain, a step down; then the next coordinate.

    A step moves all numbers of a coordinate by their whole reach. The coordinates are tried in a random order, the same
    in every round. Coordinates without reach are left out.

    Arguments:
        genes: what is searched.
        fitness: of the start.
        generator: of the order; on the CPU.
    """

    def __init__(self, genes: Genes, fitness: float, generator: torch.Generator) -> None:
        self._genes = genes
        moving = genes.coordinate[genes.reach > 0].unique()
        self._order = moving[torch.randperm(len(moving), generator=generator)]
        self._best, self._fitness = genes.start.clone(), ordered(fitness)
        self._tried = 0  # twice the number of coordinates, and one more if the next step is down

    def ask(self) -> Tensor:
        """See `Search`."""
        if not len(self._order):
            return self._best.clone()
        place, down = divmod(self._tried, 2)
        chosen = self._genes.coordinate == self._order[place % len(self._order)]
        return moved(self._genes, self._best, chosen.double() * (-1 if down else 1))

    def tell(self, child: Tensor, fitness: float) -> None:
        """See `Search`."""
        gain = ordered(fitness) < self._fitness
        if gain:
            self._best, self._fitness = child.clone(), fitness
        self._tried += 2 - self._tried % 2 if gain else 1

    @property
    def best(self) -> tuple[Tensor, float]:
        """See `Search`."""
        return self._best, self._fitness

    def state(self) -> dict[str, Tensor]:
        """See `Search`."""
        return {
            "best": self._best.clone(),
            "fitness": torch.tensor([self._fitness], dtype=torch.float64),
            "order": self._order.clone(),
            "tried": torch.tensor([self._tried]),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Search`."""
        order, tried = state["order"], int(state["tried"])
        same = torch.equal(order.sort()[0], self._order.sort()[0])
        if not within(self._genes, state["best"]) or tried < 0 or not same:
            raise ValueError("no search of these genes has such numbers or such an order")
        self._best, self._fitness = state["best"].clone(), float(state["fitness"])
        self._order, self._tried = order.clone(), tried

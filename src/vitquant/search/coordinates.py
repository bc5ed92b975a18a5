"""Coordinate search: set one coordinate after another to the best of its candidates until nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Arguments:
        choice: for each coordinate the index of the chosen candidate.
        rounds: the number of rounds over all coordinates.
        settled: whether nothing changed in the last round.
    """

    choice: dict[str, int]
    rounds: int
    settled: bool


def alternate(
    coordinates: Iterable[str],
    start: int,
    score: Callable[[str, dict[str, int]], Tensor],
    rounds: int,
    after_round: Callable[[dict[str, int]], None] | None = None,
) -> Found:
    """Choose the best candidate of each coordinate while the others stay, round after round.

    A candidate replaces the current one only if its score is higher, and the first of equal candidates is taken, so
    that a search that has settled does not change again. A coordinate is not scored again while nothing that its
    scores depend on has changed.

    Arguments:
        coordinates: in the order in which they are searched.
        start: the index of the candidate that each coordinate starts with.
        score: maps a coordinate and the current choice to the scores of the coordinate's candidates: (candidates,).
        rounds: the maximal number of rounds.
        after_round: called with the choice after each round, also the last one; its effect on later scores must depend
            on that choice alone.

    Source: VT-PTQ, Liu et al. 2021, algorithm 1, which ends after 20 rounds.
    """
    choice = dict.fromkeys(coordinates, start)
    told: dict[str, int] = {}
    scored: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
    for number in range(1, rounds + 1):
        before = dict(choice)
        for name in choice:
            seen = {other: index for other, index in choice.items() if other != name}, told
            if scored.get(name) == seen:
                continue
            scored[name] = seen
            scores = score(name, choice)
            best = int(torch.argmax(scores))
            if scores[best] > scores[choice[name]]:
                choice[name] = best
        if after_round is not None:
            after_round(choice)
            told = dict(choice)
        if choice == before:
            return Found(choice, number, settled=True)
    return Found(choice, rounds, settled=False)


def multiples(low: float, high: float, count: int) -> Tensor:
    """The multiples of a start value that a search tries: float64 (count + 1,), 1 and then evenly from low to high."""
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.linspace(low, high, count, dtype=torch.float64)])

"""One coordinate after another, each to the best of its candidates, until nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Found:
    """Where a search ended.

    Arguments:
        choice: for each coordinate the index of its candidate.
        rounds: how often all coordinates were gone through, the last time without a change unless `settled` is not.
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

    A candidate must be better than the present one to replace it, and the first of equals is taken, so a search that
    settles stays. A coordinate is not scored again while all that its scores depend on is as it was.

    Arguments:
        coordinates: in the order in which they are searched.
        start: the candidate that each begins with.
        score: from a coordinate and the present choice the score of every candidate of the coordinate: (candidates,).
        rounds: at most.
        after_round: is told the choice after each round, before it is known whether there is another; what it does to
            later scores depends on that choice alone.

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
    """The candidates' multiples of what a search begins with: float64 (count + 1,), 1 first, then low..high evenly."""
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.linspace(low, high, count, dtype=torch.float64)])

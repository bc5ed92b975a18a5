"""The best ways to spend bits: all that no other way beats in cost and sensitivity, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitquant.errors import AllocationError

_LONGEST = 100_000  # allocations of a front; those of like blocks have a few thousand


@dataclass(frozen=True)
class Choice:
    """One of the bit widths that a part of a model may have.

    Arguments:
        bits: how many.
        cost: of the part at these bits, in any unit; costs of parts are added.
        sensitivity: what is lost at these bits; sensitivities of parts are added.
    """

    bits: int
    cost: float
    sensitivity: float


@dataclass(frozen=True)
class Costs:
    """What the parts of a model cost at each bit width, in a unit that adds up: bits of weights, bytes, seconds.

    Whole numbers are better than shares of a total: sums of those that are equal differ by rounding.

    Arguments:
        of: for each part, by bits.
        unit: what totals are given in.
        fixed: what everything else costs.
        per: how many of these make one unit.
    """

    of: Mapping[str, Mapping[int, float]]
    unit: str
    fixed: float = 0.0
    per: float = 1.0

    def total(self, cost: float) -> float:
        """What parts that cost so much make of the whole, in the unit."""
        return (self.fixed + cost) / self.per


@dataclass(frozen=True)
class Allocation:
    """Bits for every part, what they cost together, and how sensitive the whole is to them."""

    bits: Mapping[str, int]
    cost: float
    sensitivity: float


def pareto_front(choices: Mapping[str, Sequence[Choice]]) -> list[Allocation]:
    """Every allocation that no other equals or beats in both cost and sensitivity, the cheapest first.

    Part by part, the allocations of the parts so far that none beats are kept: as cost and sensitivity are sums, what
    is beaten there is beaten in the whole. There are at most as many as there are different costs, which for sizes of
    like blocks are few. Of equals the one that comes first is taken.

    Arguments:
        choices: for each part its candidates, at least one.

    Raises:
        AllocationError: costs that are all different, such as measured times, let the front grow with each part, here
            beyond 100,000.

    Source: dynamic programming over the objective of VT-PTQ, Liu et al. 2021, section "Nuclear Norm Based Mixed
    Precision".
    """
    front: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for candidates in choices.values():
        grown = [
            (cost + choice.cost, sensitivity + choice.sensitivity, (*bits, choice.bits))
            for cost, sensitivity, bits in front
            for choice in candidates
        ]
        grown.sort(key=lambda state: state[:2])
        front = []
        for state in grown:
            if not front or state[1] < front[-1][1]:
                front.append(state)
        if len(front) > _LONGEST:
            raise AllocationError(f"costs differ so much that more than {_LONGEST} allocations compete; round them")
    return [Allocation(dict(zip(choices, bits, strict=True)), cost, sensitivity) for cost, sensitivity, bits in front]


def best_within(
    front: Sequence[Allocation], choices: Mapping[str, Sequence[Choice]], costs: Costs, budget: float
) -> Allocation:
    """The least sensitive allocation that costs no more than a budget.

    Arguments:
        front: of these choices.
        choices: whose cheapest and dearest say which budgets have a meaning.
        costs: from which the choices have theirs.
        budget: in the unit of the costs.

    Raises:
        AllocationError: nothing is that cheap, or everything is cheaper; it says the range.
    """
    low, high = (
        costs.total(sum(pick(choice.cost for choice in part) for part in choices.values())) for pick in (min, max)
    )
    slack = 1e-9 * abs(high)  # a budget may be given with ten digits
    if not low - slack <= budget <= high + slack:
        raise AllocationError(f"{budget:g} {costs.unit}: these candidates need between {low:.4g} and {high:.4g}")
    return next(allocation for allocation in reversed(front) if costs.total(allocation.cost) <= budget + slack)

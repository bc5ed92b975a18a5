"""The exact Pareto front of bit allocations, by cost and sensitivity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitquant.errors import AllocationError

_LONGEST = 100_000  # allocations on a front; for blocks of equal size there are a few thousand


@dataclass(frozen=True)
class Choice:
    """One of the bit widths that a part of a model may have.

    Arguments:
        bits: the bit width.
        cost: the cost of the part at this width, in any unit; costs of parts add up.
        sensitivity: the loss at this width; sensitivities of parts add up.
    """

    bits: int
    cost: float
    sensitivity: float


@dataclass(frozen=True)
class Costs:
    """The costs of a model's parts at each bit width, in an additive unit: bits of weights, bytes, seconds.

    Integers are better than fractions of a total, since with rounding equal sums of fractions would differ.

    Arguments:
        of: the cost of each part at each bit width.
        unit: the name of the unit in which totals are given.
        fixed: the cost of everything else.
        per: the divisor from costs to the unit of totals.
    """

    of: Mapping[str, Mapping[int, float]]
    unit: str
    fixed: float = 0.0
    per: float = 1.0

    def total(self, cost: float) -> float:
        """The total cost of the model in the unit, given the cost of all parts."""
        return (self.fixed + cost) / self.per


@dataclass(frozen=True)
class Allocation:
    """The bits of every part, with their total cost and total sensitivity."""

    bits: Mapping[str, int]
    cost: float
    sensitivity: float


def pareto_front(choices: Mapping[str, Sequence[Choice]]) -> list[Allocation]:
    """The Pareto-optimal allocations, in order of cost: no other is at least as good in both cost and sensitivity.

    Parts are added one by one, and only Pareto-optimal allocations of the parts so far are kept: since cost and
    sensitivity are sums, a dominated allocation of some parts cannot be a part of an optimal one. There are at most as
    many as different total costs, which are few if blocks have equal sizes. Among equal allocations the first is taken.

    Arguments:
        choices: the candidates of each part, at least one.

    Raises:
        AllocationError: the front has more than 100,000 allocations, as with costs that are all different, such
            as measured times.

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
    """The allocation with the least sensitivity whose cost is within a budget.

    Arguments:
        front: the Pareto front of the choices.
        choices: the candidates of each part, which determine the range of valid budgets.
        costs: the costs from which those of the choices were taken.
        budget: in the unit of the costs.

    Raises:
        AllocationError: the budget is below the cheapest or above the dearest allocation; the message gives the range.
    """
    low, high = (
        costs.total(sum(pick(choice.cost for choice in part) for part in choices.values())) for pick in (min, max)
    )
    slack = 1e-9 * abs(high)  # for a budget that was rounded to ten digits
    if not low - slack <= budget <= high + slack:
        raise AllocationError(f"{budget:g} {costs.unit}: these candidates need between {low:.4g} and {high:.4g}")
    return next(allocation for allocation in reversed(front) if costs.total(allocation.cost) <= budget + slack)

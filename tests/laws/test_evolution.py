"""The laws of evolutionary search: what a population keeps, whatever the fitness."""

from __future__ import annotations

import itertools
import math
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitquant.search.evolution import Evolution, EvolutionSettings
from vitquant.search.genes import Genes, within

law = settings(max_examples=60, deadline=None)
FITNESS = st.floats(allow_nan=True, allow_infinity=True)


def genes_of(start: Tensor, reach: float = 0.5, relative: bool = False, whole: bool = False) -> Genes:
    n = len(start)
    flags = torch.full((n,), relative), torch.full((n,), whole)
    limits = torch.full_like(start, -4), torch.full_like(start, 4)
    return Genes(start, torch.full_like(start, reach), *flags, *limits, torch.arange(n))


def evolution_of(genes: Genes, fitness: float = 0.0, seed: int = 0, **sizes: float) -> Evolution:
    settings = EvolutionSettings(**{"population": 5, "sample": 3, **sizes})  # type: ignore[arg-type]
    return Evolution(genes, fitness, settings, torch.Generator().manual_seed(seed))


def start(n: int = 6, seed: int = 0) -> Tensor:
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5


@law
@given(FITNESS, st.lists(FITNESS, max_size=30), st.integers(0, 2**31))
def test_the_best_is_never_lost(first: float, told: list[float], seed: int) -> None:
    evolution = evolution_of(genes_of(start()), first, seed)
    seen = [(start(), first)]
    for fitness in told:
        child = evolution.ask()
        evolution.tell(child, fitness)
        seen.append((child, fitness))
        best, of_best = evolution.best
        least = min((math.inf if math.isnan(each) else each for _, each in seen))
        assert of_best == least
        firsts = [genes for genes, each in seen if (math.inf if math.isnan(each) else each) == least]
        assert torch.equal(best, firsts[0])  # of equals the oldest


@law
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, math.nan]), max_size=30))
def test_the_least_fit_member_is_dropped_the_youngest_of_equals(told: list[float]) -> None:
    evolution = evolution_of(genes_of(start()), 1.0)
    members = [(1.0, number, start()) for number in range(5)]
    for number, fitness in enumerate(told, 5):
        child = evolution.ask()
        evolution.tell(child, fitness)
        members.append((math.inf if math.isnan(fitness) else fitness, number, child))
        members = sorted(members, key=lambda each: each[:2])[:5]
        state = evolution.state()
        kept = sorted(zip(state["fitness"].tolist(), state["members"].tolist(), strict=True))
        assert kept == sorted((each, genes.tolist()) for each, _, genes in members)


@law
@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_the_same_seed_gives_the_same_sequence(seed: int, other: int) -> None:
    def sequence(seed: int) -> Tensor:
        evolution = evolution_of(genes_of(start()), 0.0, seed)
        children = []
        for _ in range(6):
            children.append(evolution.ask())
            evolution.tell(children[-1], float(children[-1].sum()))
        return torch.stack(children)

    assert torch.equal(sequence(seed), sequence(seed))
    assert torch.equal(sequence(seed), sequence(other)) == (seed == other)


@law
@given(st.integers(0, 10), st.integers(0, 2**31), st.booleans())
def test_a_restored_evolution_continues_as_if_it_had_not_stopped(steps: int, seed: int, between: bool) -> None:
    def step(evolution: Evolution) -> Tensor:
        child = evolution.ask()
        evolution.tell(child, float(child.square().sum()))
        return child

    whole = evolution_of(genes_of(start()), 9.0, seed, rate=0.7)
    for _ in range(steps):
        step(whole)
    asked = whole.ask() if between else None  # an evaluation that was cut short is repeated from before its `ask`
    saved = pickle.loads(pickle.dumps(whole.state()))
    continued = evolution_of(genes_of(start()), 1.0, seed + 1, rate=0.7)
    continued.restore(saved)
    assert asked is None or not torch.equal(asked, start())
    for _ in range(5):
        assert torch.equal(step(whole), step(continued))
    assert torch.equal(whole.best[0], continued.best[0])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("age", torch.full((5,), 3)),
        ("age", torch.arange(-1, 4)),
        ("members", torch.full((5, 6), -5.0, dtype=torch.float64)),
        ("generator", torch.zeros_like(torch.Generator().get_state())),
    ],
)
def test_a_state_that_no_evolution_has_is_refused_and_changes_nothing(name: str, wrong: Tensor) -> None:
    evolution = evolution_of(genes_of(start()))
    before = evolution.state()
    with pytest.raises(ValueError, match=r"no evolution of these genes|the state of the generator"):
        evolution.restore(before | {name: wrong})
    assert all(torch.equal(each, evolution.state()[key]) for key, each in before.items())


def test_a_state_is_not_changed_by_later_steps() -> None:
    evolution = evolution_of(genes_of(start()), 9.0)
    saved = evolution.state()
    before = {name: each.clone() for name, each in saved.items()}
    for fitness in (1.0, 0.5):
        evolution.tell(evolution.ask(), fitness)
    assert all(torch.equal(saved[name], before[name]) for name in before)


@law
@given(st.integers(0, 2**31), st.booleans(), st.booleans(), st.floats(0.01, 0.9))
def test_children_are_within_reach_of_a_parent_and_within_the_limits(
    seed: int, relative: bool, whole: bool, reach: float
) -> None:
    begin = start(50, seed).round() if whole else start(50, seed)
    genes = genes_of(begin, 1.0 if whole else reach, relative and not whole, whole)
    evolution = evolution_of(genes, 0.0, seed)
    for _ in range(4):
        child = evolution.ask()
        most = genes.reach * (begin if genes.relative.any() else 1.0)
        assert bool(((child - begin).abs() <= most + 1e-12).all())
        assert within(genes, child)
        assert not torch.equal(child, begin)


def test_a_mutation_is_uniform() -> None:
    genes = genes_of(torch.full((20_000,), 1.0, dtype=torch.float64), 0.25)
    moved = evolution_of(genes).ask() - 1
    quarters = torch.histc(moved.float(), 4, -0.25, 0.25) / len(moved)
    assert quarters.tolist() == pytest.approx([0.25] * 4, abs=0.02)


def test_the_rate_is_the_share_of_numbers_that_move() -> None:
    genes = genes_of(torch.ones(20_000, dtype=torch.float64))
    child = evolution_of(genes, rate=0.1).ask()
    assert (child != 1).double().mean().item() == pytest.approx(0.1, abs=0.01)


def test_whole_numbers_move_up_and_down_by_a_quarter_each() -> None:
    genes = genes_of(torch.zeros(20_000, dtype=torch.float64), 1.0, whole=True)
    child = evolution_of(genes).ask()
    shares = [(child == each).double().mean().item() for each in (-1, 0, 1)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


def test_a_number_is_reflected_at_the_lower_limit_as_published() -> None:
    genes = genes_of(torch.full((1000,), 0.01, dtype=torch.float64), 1.0)
    genes = replace(genes, low=torch.zeros(1000, dtype=torch.float64))
    free = replace(genes, low=torch.full((1000,), -4.0, dtype=torch.float64))
    child, unlimited = evolution_of(genes, seed=3).ask(), evolution_of(free, seed=3).ask()
    assert bool((unlimited < 0).any())
    torch.testing.assert_close(child, unlimited.abs(), rtol=0, atol=1e-15)


def test_the_fittest_of_the_sample_is_the_parent() -> None:
    genes = genes_of(torch.zeros(3, dtype=torch.float64), 1e-9)
    evolution = evolution_of(genes, 5.0, population=3, sample=64)  # a sample that holds every member
    evolution.tell(torch.full((3,), 2.0, dtype=torch.float64), 1.0)
    assert evolution.ask().tolist() == pytest.approx([2.0] * 3, abs=1e-8)
    single = evolution_of(genes, 5.0, population=2, sample=1)
    single.tell(torch.full((3,), 2.0, dtype=torch.float64), 1.0)
    parents = {round(float(single.ask()[0])) for _ in range(50)}
    assert parents == {0, 2}  # a sample of one may be either


def test_it_finds_what_trying_everything_finds() -> None:
    def height(x: Tensor) -> float:
        a, b, c = (float(each) for each in x)
        return (a - 2) ** 2 + (b + 3) ** 2 + abs(a + c) + 0.3 * math.cos(3 * b)

    grid = [torch.tensor(each, dtype=torch.float64) for each in itertools.product(range(-4, 5), repeat=3)]
    lowest = min(map(height, grid))
    genes = genes_of(torch.zeros(3, dtype=torch.float64), 1.0, whole=True)
    evolution = evolution_of(genes, height(genes.start), seed=1, population=15, sample=10)
    for _ in range(300):
        child = evolution.ask()
        evolution.tell(child, height(child))
    assert evolution.best[1] == lowest


def test_what_is_not_within_the_limits_is_known() -> None:
    genes = genes_of(torch.zeros(2, dtype=torch.float64), 1.0, whole=True)
    assert within(genes, torch.tensor([[4.0, -4.0], [0.0, 1.0]], dtype=torch.float64))
    assert not within(genes, torch.tensor([0.0, 4.5], dtype=torch.float64))
    assert not within(genes, torch.tensor([0.0, 0.5], dtype=torch.float64))

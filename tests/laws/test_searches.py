"""The laws of every search by ask and tell, whatever the fitness."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitquant.search.coordinate_descent import CoordinateDescent
from vitquant.search.evolution import Evolution, EvolutionSettings
from vitquant.search.genes import Genes, Search, within
from vitquant.search.random_search import RandomSearch

law = settings(max_examples=40, deadline=None)
FITNESS = st.floats(allow_nan=True, allow_infinity=True)
SEARCHES: dict[str, Callable[[Genes, float, torch.Generator], Search]] = {
    "evolution": lambda genes, fitness, generator: Evolution(genes, fitness, EvolutionSettings(5, 3), generator),
    "random": RandomSearch,
    "coordinates": CoordinateDescent,
}
every = pytest.mark.parametrize("name", SEARCHES)


def genes_of(n: int = 6, reach: float = 0.5, whole: bool = False) -> Genes:
    begin = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    begin = begin.round() if whole else begin
    flags = torch.zeros(n, dtype=torch.bool), torch.full((n,), whole)
    limits = torch.full_like(begin, -4), torch.full_like(begin, 4)
    return Genes(begin, torch.full_like(begin, reach), *flags, *limits, torch.arange(n))


def made(name: str, genes: Genes, fitness: float = 9.0, seed: int = 0) -> Search:
    return SEARCHES[name](genes, fitness, torch.Generator().manual_seed(seed))


def steps(search: Search, count: int, fitness: Callable[[Tensor], float]) -> list[Tensor]:
    children = []
    for _ in range(count):
        children.append(search.ask())
        search.tell(children[-1], fitness(children[-1]))
    return children


def comparable(fitness: float) -> float:
    return math.inf if math.isnan(fitness) else fitness


@every
@law
@given(FITNESS, st.lists(FITNESS, max_size=20), st.integers(0, 2**31))
def test_the_best_is_never_lost_and_of_equals_is_the_oldest(
    name: str, first: float, told: list[float], seed: int
) -> None:
    genes = genes_of()
    search = made(name, genes, first, seed)
    seen = [(genes.start, comparable(first))]
    for fitness in told:
        child = search.ask()
        search.tell(child, fitness)
        seen.append((child, comparable(fitness)))
        best, least = search.best[0], min(each for _, each in seen)
        assert search.best[1] == least
        assert torch.equal(best, next(each for each, of_it in seen if of_it == least))


@every
@law
@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_the_same_seed_gives_the_same_sequence(name: str, seed: int, other: int) -> None:
    def children(seed: int) -> Tensor:
        return torch.stack(steps(made(name, genes_of(40), 9.0, seed), 6, lambda x: float(x.sum())))

    assert torch.equal(children(seed), children(seed))
    assert torch.equal(children(seed), children(other)) == (seed == other)


@every
@law
@given(st.integers(0, 12), st.integers(0, 2**31))
def test_a_restored_search_continues_as_if_it_had_not_stopped(name: str, count: int, seed: int) -> None:
    def fitness(x: Tensor) -> float:
        return float(x.square().sum())

    search = made(name, genes_of(), fitness(genes_of().start), seed)
    steps(search, count, fitness)
    saved = pickle.loads(pickle.dumps(search.state()))
    search.ask()  # an evaluation that was cut short is repeated from before its `ask`
    search.restore(saved)
    continued = made(name, genes_of(), 1.0, seed + 1)
    continued.restore(saved)
    expected = steps(search, 5, fitness)
    assert all(torch.equal(*pair) for pair in zip(steps(continued, 5, fitness), expected, strict=True))
    assert torch.equal(continued.best[0], search.best[0])
    assert continued.best[1] == search.best[1]
    assert all(torch.equal(each, saved[key]) for key, each in pickle.loads(pickle.dumps(saved)).items())


@pytest.mark.parametrize(
    ("name", "key", "wrong"),
    [
        ("random", "best", torch.full((6,), -5.0, dtype=torch.float64)),
        ("random", "generator", torch.zeros_like(torch.Generator().get_state())),
        ("coordinates", "best", torch.full((6,), -5.0, dtype=torch.float64)),
        ("coordinates", "order", torch.zeros(6, dtype=torch.int64)),
        ("coordinates", "tried", torch.tensor([-1])),
    ],
)
def test_a_state_that_no_search_has_is_refused_and_changes_nothing(name: str, key: str, wrong: Tensor) -> None:
    search = made(name, genes_of())
    before = search.state()
    with pytest.raises(ValueError, match=r"no search of these genes|the state of the generator"):
        search.restore(before | {key: wrong})
    assert all(torch.equal(each, search.state()[name]) for name, each in before.items())


@every
@law
@given(st.integers(0, 2**31), st.booleans())
def test_children_are_within_the_limits_and_within_reach(name: str, seed: int, whole: bool) -> None:
    genes = genes_of(30, 1.0, whole)
    for child in steps(made(name, genes, 9.0, seed), 4, lambda _: 9.0):
        assert within(genes, child)
        assert bool(((child - genes.start).abs() <= 1.0 + 1e-12).all())
        assert not torch.equal(child, genes.start)


def test_random_search_stays_around_the_start() -> None:
    genes = genes_of()
    search = made("random", genes)
    for number, child in enumerate(steps(search, 50, lambda x: -float(x.sum()))):
        assert bool(((child - genes.start).abs() <= 0.5 + 1e-12).all()), number
    assert search.best[1] < -float(genes.start.sum())


def test_coordinate_descent_moves_one_coordinate_up_then_down_and_keeps_gains() -> None:
    genes = replace(genes_of(6), coordinate=torch.tensor([0, 0, 1, 1, 1, 2]))
    search = made("coordinates", genes, seed=1)
    tried = [(child - genes.start) for child in steps(search, 6, lambda _: 9.0)]  # nothing is a gain
    for up, down in zip(tried[::2], tried[1::2], strict=True):
        (moving,) = genes.coordinate[up != 0].unique().tolist()
        expected = torch.where(genes.coordinate == moving, 0.5, 0.0).double()
        torch.testing.assert_close(up, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(down, -expected, rtol=0, atol=1e-12)
    assert {int(genes.coordinate[each != 0][0]) for each in tried} == {0, 1, 2}
    gained = search.ask()
    search.tell(gained, 1.0)
    following = search.ask() - gained  # from what was a gain, and another coordinate
    moving = genes.coordinate[following.abs() > 1e-12].unique()
    assert len(moving) == 1
    assert bool((gained[genes.coordinate == moving] == genes.start[genes.coordinate == moving]).all())
    assert bool((following[genes.coordinate == moving] > 0).all())


def test_coordinates_without_reach_are_left_out() -> None:
    genes = genes_of()
    reach = genes.reach.clone()
    reach[:4] = 0
    for child in steps(made("coordinates", replace(genes, reach=reach)), 8, lambda _: 9.0):
        assert bool((child != genes.start)[4:].any())
        assert torch.equal(child[:4], genes.start[:4])
    still = made("coordinates", replace(genes, reach=torch.zeros(6, dtype=torch.float64)))
    assert torch.equal(still.ask(), genes.start)


@every
def test_it_finds_the_lowest_point_of_a_bowl(name: str) -> None:
    genes = replace(genes_of(3, 1.0, whole=True), start=torch.zeros(3, dtype=torch.float64))
    lowest = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)  # within one step of the start

    def height(x: Tensor) -> float:
        return float((x - lowest).square().sum())

    search = made(name, genes, height(genes.start), 1)
    steps(search, 200, height)
    assert torch.equal(search.best[0], lowest)

"""VT-PTQ's equations against float64, written from the paper."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitquant.objectives.correlation import LinearOutput, correlation
from vitquant.objectives.product_output import ProductOutput, Ranking
from vitquant.objectives.ranking import column_pairs, differences, ranking_loss
from vitquant.quantizers import build_quantizer
from vitquant.quantizers.quantizer import Quantizer
from vitquant.search.coordinates import alternate, multiples
from vitquant.spec import PerAxis, PerTensor, QParams, QuantSpec

law = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**31)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizers(scale: float, count: int, bits: int = 4) -> list[Quantizer]:
    spec = QuantSpec(bits, signed=True, symmetric=True)
    zero = torch.zeros((), dtype=torch.int32)
    return [build_quantizer(spec, QParams(scale * m, zero)) for m in torch.linspace(0.3, 1.5, count)]


def pearson(y: Tensor, y_hat: Tensor) -> float:
    """Gamma, as the paper writes it."""
    a, b = (each.double().flatten() - each.double().mean() for each in (y, y_hat))
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt())


@law
@given(SEEDS)
def test_correlation_is_pearson_s(seed: int) -> None:
    y, y_hat = random(3, 4, 5, seed=seed), random(3, 4, 5, seed=seed + 1)
    y_hat = y + 0.1 * y_hat + 3.0
    assert correlation(y, y_hat).tolist() == pytest.approx([pearson(a, b) for a, b in zip(y, y_hat, strict=True)])


def test_a_constant_output_has_no_direction() -> None:
    y = random(2, 4, 5, seed=0)
    constant = torch.full_like(y, 0.1)
    for pair in ((y, constant), (constant, y), (constant, constant)):
        assert correlation(*pair).tolist() == [0.0, 0.0]


@law
@given(SEEDS, st.sampled_from([(5, 3), (3, 5), (4, 4)]), st.booleans(), st.booleans())
def test_candidates_of_a_linear_layer_are_scored_as_their_outputs_are(
    seed: int, sizes: tuple[int, int], has_bias: bool, by_channel: bool
) -> None:
    inputs, outputs = sizes
    x, weight = random(3, 7, inputs, seed=seed), random(outputs, inputs, seed=seed + 1)
    bias = random(outputs, seed=seed + 2) if has_bias else None
    new_bias = torch.zeros(outputs) if bias is None else bias + 0.3
    layer, y = LinearOutput(x, weight, bias), torch.nn.functional.linear(x, weight, bias)
    candidates = quantizers(0.3, 6)
    spec = QuantSpec(4, True, True, PerAxis(0) if by_channel else PerTensor())
    scale = weight.abs().amax(1) / 7 if by_channel else weight.abs().max() / 7
    kept = build_quantizer(spec, QParams(scale, torch.zeros_like(scale, dtype=torch.int32)))

    def score(xq: Tensor, wq: Tensor) -> float:
        outputs = torch.nn.functional.linear(xq.double(), wq.double(), new_bias.double())
        return sum(pearson(a, b) for a, b in zip(y, outputs, strict=True)) / 3

    found = layer.of_inputs(candidates, kept, new_bias)
    assert found.tolist() == pytest.approx([score(each(x), kept(weight)) for each in candidates], abs=1e-6)
    found = layer.of_weights(candidates[2], candidates, new_bias)
    assert found.tolist() == pytest.approx([score(candidates[2](x), each(weight)) for each in candidates], abs=1e-6)


@law
@given(SEEDS, st.booleans())
def test_the_corrected_bias_gives_each_output_its_float_mean(seed: int, has_bias: bool) -> None:
    x, weight = random(3, 7, 5, seed=seed) + 1.0, random(4, 5, seed=seed + 1)
    bias = random(4, seed=seed + 2) if has_bias else None
    quantize, wq = quantizers(0.3, 1)[0], weight + 0.1
    corrected = LinearOutput(x, weight, bias).corrected_bias(quantize, lambda _: wq)
    y_hat = torch.nn.functional.linear(quantize(x), wq, corrected)
    y = torch.nn.functional.linear(x, weight, bias)
    assert torch.allclose(y_hat.mean((0, 1)), y.mean((0, 1)), atol=1e-5)


def loops(a_hat: Tensor, a: Tensor, pairs: list[tuple[int, int]], theta: float) -> float:
    """L_ranking, term by term, over the number of terms."""
    terms = []
    for row_hat, row in zip(a_hat.flatten(0, -2).tolist(), a.flatten(0, -2).tolist(), strict=True):
        for i, j in pairs:
            sign = (row[i] > row[j]) - (row[i] < row[j])
            terms.append(max(0.0, theta - (row_hat[i] - row_hat[j]) * sign))
    return sum(terms) / len(terms)


def loss_of_maps(a_hat: Tensor, a: Tensor, pairs: Tensor, theta: float) -> Tensor:
    return ranking_loss(differences(a_hat.mT, pairs), torch.sign(differences(a.mT, pairs)), theta)


@law
@given(SEEDS, st.integers(2, 6), st.sampled_from([0.0, 0.2, 5.0]), st.booleans())
def test_the_ranking_loss_is_the_published_sum_over_its_terms(
    seed: int, columns: int, theta: float, ties: bool
) -> None:
    a, a_hat = random(2, 3, 4, columns, seed=seed), random(2, 3, 4, columns, seed=seed + 1)
    a = a.round() if ties else a
    pairs = column_pairs(columns, 0, 0)
    assert {tuple(pair) for pair in pairs.T.tolist()} == set(itertools.combinations(range(columns), 2))
    expected = [loops(b, c, [tuple(pair) for pair in pairs.T.tolist()], theta) for b, c in zip(a_hat, a, strict=True)]
    assert loss_of_maps(a_hat, a, pairs, theta).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_map_of_equal_entries_has_the_margin_for_a_loss_whatever_is_made_of_it() -> None:
    same = torch.full((2, 3, 4, 5), 0.2)
    for a_hat in (same, random(2, 3, 4, 5, seed=0)):
        assert loss_of_maps(a_hat, same, column_pairs(5, 0, 0), 0.2).tolist() == pytest.approx([0.2, 0.2])


@law
@given(SEEDS, st.integers(2, 30), st.integers(1, 40))
def test_a_sample_of_pairs_has_no_pair_twice_and_depends_on_its_seed_alone(seed: int, columns: int, most: int) -> None:
    pairs = column_pairs(columns, most, seed)
    assert torch.equal(pairs, column_pairs(columns, most, seed))
    assert pairs.shape[1] == min(most, columns * (columns - 1) // 2)
    assert pairs.unique(dim=1).shape == pairs.shape
    few = min(most, columns * (columns - 1) // 4)  # of which there is more than one sample
    drawn = {str(column_pairs(columns, few, seed + i).tolist()) for i in range(8)}
    assert len(drawn) > 1 or few == 0 or columns < 4
    assert bool((pairs[0] < pairs[1]).all())


@law
@given(SEEDS, st.sampled_from([0.0, 0.1]), st.sampled_from([None, 0.125]))
def test_candidates_of_a_product_are_scored_by_correlation_less_ranking_loss(
    seed: int, gamma: float, factor: float | None
) -> None:
    left, right = random(3, 2, 4, 6, seed=seed), random(3, 2, 6, 5, seed=seed + 1)
    product = ProductOutput(left, right, factor, Ranking(gamma, pairs=0))
    candidates, fixed = quantizers(0.3, 5), quantizers(0.25, 1)[0]

    def score(lq: Tensor, rq: Tensor, ranked: bool) -> float:
        total = 0.0
        for i in range(3):
            y, y_hat = left[i] @ right[i], lq[i] @ rq[i]
            total += pearson(y, y_hat)
            a, a_hat = (left[i], lq[i]) if factor is None else (y * factor, y_hat * factor)
            pairs = list(itertools.combinations(range(a.shape[-1]), 2))
            total -= gamma * loops(a_hat, a, pairs, 0.2) if ranked else 0.0
        return total / 3

    found = product.of_operands(candidates, [fixed])
    expected = [score(each(left), fixed(right), True) for each in candidates]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    found = product.of_operands([fixed], candidates)
    expected = [score(fixed(left), each(right), factor is not None) for each in candidates]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_seed_of_a_ranking_draws_its_pairs() -> None:
    query, key = random(2, 3, 12, 8, seed=0), random(2, 3, 8, 12, seed=1)
    candidates = quantizers(0.5, 5, bits=4)

    def scores(seed: int) -> list[float]:
        return (
            ProductOutput(query, key, 0.25, Ranking(1.0, 0.2, 2, seed)).of_operands(candidates, candidates[:1]).tolist()
        )

    assert scores(0) == scores(0)
    assert len({tuple(scores(seed)) for seed in range(6)}) > 1


def test_a_sample_of_pairs_gives_the_choice_that_all_pairs_give() -> None:
    query, key = random(2, 3, 96, 16, seed=0), random(2, 3, 16, 96, seed=1)
    candidates = quantizers(0.5, 20, bits=4)
    choices = [
        int(
            ProductOutput(query, key, 0.25, Ranking(1.0, pairs=pairs)).of_operands(candidates, candidates[-1:]).argmax()
        )
        for pairs in (0, 256)
    ]
    assert choices[0] == choices[1]


def test_coordinates_settle_where_no_candidate_of_any_is_better() -> None:
    table, asked = random(5, 7, seed=3).double(), []

    def score(name: str, choice: dict[str, int]) -> Tensor:
        asked.append(name)
        return table[:, choice["right"]] if name == "left" else table[choice["left"]]

    told = []
    found = alternate(["left", "right"], 0, score, 20, lambda choice: told.append(dict(choice)))
    left, right = found.choice["left"], found.choice["right"]
    assert table[left, right] == table[:, right].max() == table[left].max()
    assert found.settled
    assert len(told) == found.rounds
    assert told[-1] == told[-2] == found.choice
    assert asked == ["left", "right"] * found.rounds
    assert not alternate(["left", "right"], 0, score, 1).settled


@law
@given(SEEDS)
def test_a_coordinate_is_scored_again_only_when_another_has_changed(seed: int) -> None:
    table, asked = random(5, 7, seed=seed).double(), []

    def score(name: str, choice: dict[str, int]) -> Tensor:
        asked.append((name, choice["right" if name == "left" else "left"]))
        return table[:, choice["right"]] if name == "left" else table[choice["left"]]

    found = alternate(["left", "right"], 0, score, 20)
    assert len(asked) >= 2
    assert all(asked[i] != asked[i + 2] for i in range(len(asked) - 2))
    assert found == alternate(["left", "right"], 0, score, 20, lambda choice: None)


def test_a_candidate_as_good_as_the_present_one_does_not_replace_it() -> None:
    found = alternate(["only"], 2, lambda name, choice: torch.zeros(4), 20)
    assert (found.choice, found.rounds) == ({"only": 2}, 1)


def test_multiples_begin_with_one_and_span_the_published_range() -> None:
    found = multiples(0.5, 1.2, 100)
    assert (len(found), float(found[0]), float(found[1]), float(found[-1])) == (101, 1.0, 0.5, 1.2)

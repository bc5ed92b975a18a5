"""Bits by dynamic programming against every allocation there is, and sensitivities against float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitquant
from vitquant.allocation.front import Choice, Costs, best_within, pareto_front
from vitquant.errors import AllocationError
from vitquant.recipe import load_recipe

law = settings(max_examples=150, deadline=None)
COSTS = st.one_of(st.integers(1, 12), st.floats(0.5, 3.0, width=16))


@st.composite
def some_choices(draw) -> dict[str, list[Choice]]:
    parts = draw(st.integers(1, 5))
    return {
        f"part{part}": [
            Choice(bits, draw(COSTS), draw(st.integers(0, 20))) for bits in range(2, 2 + draw(st.integers(1, 4)))
        ]
        for part in range(parts)
    }


def everything(choices: dict[str, list[Choice]]) -> list[tuple[float, float]]:
    return [
        (sum(choice.cost for choice in each), sum(choice.sensitivity for choice in each))
        for each in itertools.product(*choices.values())
    ]


@law
@given(some_choices())
def test_the_front_is_what_no_allocation_beats(choices: dict[str, list[Choice]]) -> None:
    found = everything(choices)
    front = pareto_front(choices)
    best = {
        (cost, lost)
        for cost, lost in found
        if not any((c <= cost and s < lost) or (c < cost and s <= lost) for c, s in found)
    }
    assert [(each.cost, each.sensitivity) for each in front] == sorted(best)
    for each in front:
        chosen = [next(c for c in choices[part] if c.bits == bits) for part, bits in each.bits.items()]
        assert list(each.bits) == list(choices)
        assert (sum(c.cost for c in chosen), sum(c.sensitivity for c in chosen)) == (each.cost, each.sensitivity)


@law
@given(some_choices(), st.floats(0, 1), st.floats(0, 5), st.sampled_from([1.0, 10.0]))
def test_the_best_within_a_budget_is_the_best_there_is(
    choices: dict[str, list[Choice]], share: float, fixed: float, per: float
) -> None:
    costs = Costs({}, "units", fixed, per)
    found = everything(choices)
    low, high = min(cost for cost, _ in found), max(cost for cost, _ in found)
    budget = costs.total(low + share * (high - low))
    chosen = best_within(pareto_front(choices), choices, costs, budget)
    assert costs.total(chosen.cost) <= budget * (1 + 1e-8)
    assert chosen.sensitivity <= min(lost for cost, lost in found if costs.total(cost) <= budget)


def test_a_budget_that_nothing_meets_is_refused_with_the_range() -> None:
    choices = {"a": [Choice(4, 4, 3.0), Choice(8, 8, 1.0)], "b": [Choice(4, 2, 1.0), Choice(8, 4, 0.5)]}
    costs, front = Costs({}, "MB", 4, 10), pareto_front(choices)
    for budget in (0.99, 1.61, float("nan")):
        with pytest.raises(AllocationError, match=r"MB: these candidates need between 1 and 1\.6"):
            best_within(front, choices, costs, budget)
    assert best_within(front, choices, costs, 1.6).bits == {"a": 8, "b": 8}
    assert best_within(front, choices, costs, 1.0).bits == {"a": 4, "b": 4}


def test_many_blocks_have_a_front_of_few() -> None:
    choices = {
        f"blocks.{block}": [Choice(bits, bits * (1 + block % 2), 2.0**-bits * (block + 1)) for bits in range(4, 9)]
        for block in range(48)
    }
    front = pareto_front(choices)
    assert len(front) <= 48 * 2 * 4 + 1
    assert (front[0].cost, front[-1].cost) == (4 * 72, 8 * 72)


def tiny_vit() -> torch.nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=3, img_size=64, num_classes=7
    ).eval()


def quantize_to(x: torch.Tensor, bits: int) -> torch.Tensor:
    """VT-PTQ's quantizer with the scale of the maximum, in float64."""
    step = float((x.abs().max() / (2 ** (bits - 1) - 0.5)).float())
    return (x / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step


def test_a_sensitivity_is_the_nuclear_norm_times_the_squared_error() -> None:
    """Omega of one attention and one MLP, written from the paper on the float model's own modules."""
    # In float64, where no code of the reference rounds the other way on any processor.
    model = tiny_vit().double()
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    recipe = load_recipe("vt-ptq")
    calibrated = replace(recipe, methods=recipe.methods[:1])  # scales of the maximum
    table = vitquant.sensitivity(model, calibrated, [images], candidates=(5, 8))
    held: dict[str, torch.Tensor] = {}
    block = model.blocks[1]
    block.attn.qkv.register_forward_hook(lambda _, given, made: held.update(x=given[0], qkv=made))
    block.mlp.register_forward_hook(lambda _, given, made: held.update(m=given[0], y=made))
    with torch.no_grad():
        model(images)

        def scores(qkv: torch.Tensor, quantize) -> torch.Tensor:
            q, k, _ = qkv.view(3, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
            return quantize(q) @ quantize(k).mT / 4

        for bits in (5, 8):
            attention = block.attn.qkv
            weight = quantize_to(attention.weight, bits)
            # the scales of query and key are those of the float ones
            q, k, _ = held["qkv"].view(3, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
            steps = [float((each.abs().max() / (2 ** (bits - 1) - 0.5)).float()) for each in (q, k)]
            made = torch.nn.functional.linear(quantize_to(held["x"], bits), weight, attention.bias)
            q_hat, k_hat, _ = made.view(3, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            q_hat, k_hat = (
                (each / step).round().clamp(low, high) * step for each, step in zip((q_hat, k_hat), steps, strict=True)
            )
            a, a_hat = scores(held["qkv"], lambda x: x), q_hat @ k_hat.mT / 4
            omega = (torch.linalg.svdvals(a).sum((1, 2)) * (a_hat - a).square().sum((1, 2, 3))).mean()
            found = next(each for each in table.modules if (each.name, each.bits) == ("blocks.1.attn", str(bits)))
            assert found.nuclear_sensitivity == pytest.approx(float(omega), rel=1e-6)
            assert found.nuclear_norm == pytest.approx(float(torch.linalg.svdvals(a).sum((1, 2)).mean()), rel=1e-6)

            fc1, fc2 = block.mlp.fc1, block.mlp.fc2
            inner = torch.nn.functional.gelu(fc1(held["m"]))
            step = float((inner.abs().max() / (2 ** (bits - 1) - 0.5)).float())
            hidden = torch.nn.functional.linear(quantize_to(held["m"], bits), quantize_to(fc1.weight, bits), fc1.bias)
            hidden = (torch.nn.functional.gelu(hidden) / step).round().clamp(low, high) * step
            y_hat = torch.nn.functional.linear(hidden, quantize_to(fc2.weight, bits), fc2.bias)
            omega = (torch.linalg.svdvals(held["y"]).sum(1) * (y_hat - held["y"]).square().sum((1, 2))).mean()
            found = next(each for each in table.modules if (each.name, each.bits) == ("blocks.1.mlp", str(bits)))
            assert found.nuclear_sensitivity == pytest.approx(float(omega), rel=1e-6)

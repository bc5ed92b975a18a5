"""Adversarial distillation: what is made, what is learned from it, and that nothing is lost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import vitquant
from vitquant.errors import CalibrationError, RecipeError
from vitquant.methods import adversarial_distillation
from vitquant.methods.adversarial_distillation import DistillAdversariallySettings
from vitquant.model import QuantizedModel
from vitquant.model.saved import digest
from vitquant.model.simulation import ExactSimulation
from vitquant.runtime.on_images import interpreted
from vitquant.synthesis.patch_similarity import Objective, Optimized

ARGUMENTS = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 10}
RECIPE = "repq-vit+adversarially-distilled"
SHORT = {"cycles": 2, "images": 4, "iterations": 5, "warmup": 1, "steps": 3, "batch": 4}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **ARGUMENTS).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)


def distilled(
    network: nn.Module,
    images: torch.Tensor,
    settings: dict[str, Any],
    recipe: str = RECIPE,
    bits: str = "w4a4",
    **given: Any,
) -> QuantizedModel:
    named = {f"distill-adversarially.{key}": value for key, value in {**SHORT, **settings}.items()}
    return vitquant.quantize(network, recipe, images.split(5), bits=bits, settings=named, **given)


def of_the_images(monkeypatch: pytest.MonkeyPatch) -> list[Optimized]:
    """What is made from now on."""
    found: list[Optimized] = []
    optimize = adversarial_distillation.optimize

    def kept(objective: Objective, *given: Any, **named: Any) -> Optimized:
        found.append(optimize(objective, *given, **named))
        return found[-1]

    monkeypatch.setattr(adversarial_distillation, "optimize", kept)
    return found


def test_images_are_made_on_which_the_student_disagrees(network, images, monkeypatch) -> None:
    made = of_the_images(monkeypatch)
    for weight in (0.0, 1000.0):
        distilled(network, images, {"cycles": 1, "iterations": 40, "disagreement": weight}, bits="w3a4")
    for each in made:
        assert each.images.shape == (4, 3, 32, 32)
        assert -2 <= each.images.min() <= each.images.max() <= 2
    without, against = ([row[3] for row in each.trace] for each in made)
    assert against[-1] > 1.2 * without[-1]
    assert against[-1] > 1.2 * against[0]


def test_the_student_learns_over_the_cycles(network, images) -> None:
    settings = {"cycles": 4, "steps": 20, "weights": 1e-2, "scales": 1e-3}
    record = distilled(network, images, settings, bits="w3a8").records[-1]
    assert record.method == "distill-adversarially"
    assert (record.summary["cycles"], record.summary["images made"], record.summary["steps"]) == (4, 16, 80)
    assert record.summary["output error, last cycle"] < 0.8 * record.summary["output error, first cycle"]


def test_the_result_is_plain_repeats_saves_loads_and_lowers(network, images, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    recipe = f"{RECIPE}+fully-integer+wide-residual"
    model, again = (distilled(network, images, {}, recipe, "w6a6s5") for _ in range(2))
    assert digest(model) == digest(again)
    other = distilled(network, images, {}, recipe, "w6a6s5", seed=1)
    assert digest(model) != digest(other)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(tensor.requires_grad for tensor in model.buffers())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.save(tmp_path / "out")
    assert torch.equal(vitquant.load(tmp_path / "out", model=network)(images), model(images))
    assert torch.equal(interpreted(vitquant.lower(model))(images), ExactSimulation(model)(images).float())


def test_without_iterations_it_learns_from_the_calibration_images_alone(network, images, monkeypatch) -> None:
    made = of_the_images(monkeypatch)
    record = distilled(network, images, {"iterations": 0}).records[-1]
    assert made == []
    assert (record.summary["images made"], record.summary["steps"]) == (0, 6)


def test_a_killed_distillation_continues_bit_for_bit(network, images, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("vitquant.work._EVERY", 0.0)
    monkeypatch.setattr("vitquant.work._SHARE", math.inf)
    whole = distilled(network, images, {})
    calls = 0

    def interrupt(what: str, done: int, total: int) -> None:
        nonlocal calls
        calls += "cycle" in what
        if "cycle" in what and calls in (3, 7, 11, 15):  # images and training, of both cycles
            raise KeyboardInterrupt

    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            distilled(network, images, {}, work=tmp_path / "work", progress=interrupt)
    counted = calls
    continued = distilled(network, images, {}, work=tmp_path / "work", progress=interrupt)
    assert digest(continued) == digest(whole)
    assert continued.records[-1] == whole.records[-1]
    assert counted < calls <= 2 * (5 + 3) + 4
    assert not list((tmp_path / "work").glob("*images*"))


def test_the_time_limit_leaves_a_valid_model(network, images) -> None:
    model = distilled(network, images, {}, time_limit=0)
    assert (model.records[-1].summary["cycles"], model.records[-1].summary["steps"]) == (0, 0)
    assert torch.isfinite(model(images)).all()


def test_a_loss_that_is_not_finite_is_refused_with_what_to_lower(network, images, monkeypatch) -> None:
    losses = Objective.losses
    monkeypatch.setattr(
        Objective, "losses", lambda *given: (found := losses(*given))._replace(variation=found.variation * math.nan)
    )
    with pytest.raises(CalibrationError, match="cycle 1: lower rate or disagreement"):
        distilled(network, images, {})
    monkeypatch.undo()
    with pytest.raises(CalibrationError, match="allow more memory"):
        distilled(network, images, {}, memory=1e-6)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"cycles": 0}, "cycles = 0: it is a whole number"),
        ({"batch": 1.5}, "batch = 1.5: it is a whole number"),
        ({"iterations": -1}, "iterations = -1"),
        ({"disagreement": -1.0}, "disagreement = -1"),
        ({"disagreement": math.nan}, "disagreement = nan"),
        ({"weights": 1.0}, "weights = 1"),
    ],
)
def test_numbers_without_meaning_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        DistillAdversariallySettings(**wrong)  # type: ignore[arg-type]

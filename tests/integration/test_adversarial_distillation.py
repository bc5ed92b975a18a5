"""Adversarial distillation: what is made, what is learned from it, and that nothing is lost."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import vitquant
from vitquant.errors import CalibrationError, CheckpointError, ModelError, RecipeError
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.methods import adversarial_distillation
from vitquant.methods.adversarial_distillation import DistillAdversariallySettings, check_attention
from vitquant.model import QuantizedModel
from vitquant.model.saved import digest
from vitquant.model.simulation import ExactSimulation
from vitquant.runtime.on_images import interpreted
from vitquant.synthesis.patch_similarity import Draws, Objective, Optimized

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
    **others: Any,
) -> QuantizedModel:
    named = {f"distill-adversarially.{key}": value for key, value in {**SHORT, **settings}.items()}
    return vitquant.quantize(network, recipe, images.split(5), bits=bits, settings=named, **others)


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


def test_a_state_that_no_distillation_has_is_a_line(network, images, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("distilling") and done == 2:
            raise KeyboardInterrupt

    recipe, work = "minmax+adversarially-distilled", tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        distilled(network, images, {}, recipe, "w8a8", work=work, progress=interrupt)
    file = next(work.glob("*.part.safetensors"))
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    values = json.loads(about["values"])
    for change in ({"made": [7]}, {"made": [-1]}, {"cycle": 2}, {"cycle": 99}, {"errors": [0.1] * 7}):
        save_file(tensors, file, {**about, "values": json.dumps({**values, **change})})
        with pytest.raises(CheckpointError, match="is damaged: remove it"):
            distilled(network, images, {}, recipe, "w8a8", work=work)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_another_precision_are_distilled(network, images, dtype: torch.dtype, tmp_path: Path) -> None:
    given = copy.deepcopy(network).to(dtype)
    recipe = "minmax+adversarially-distilled"
    work = tmp_path / "work"
    model = distilled(given, images.to(dtype), {}, recipe, "w8a8", work=work)
    assert torch.isfinite(model(images.to(dtype))).all()
    assert digest(distilled(given, images.to(dtype), {}, recipe, "w8a8", work=work)) == digest(model)


def test_every_cycle_has_draws_of_its_own(network, images, monkeypatch) -> None:
    drawn: list[Draws] = []
    optimize = adversarial_distillation.optimize

    def kept(objective: Objective, draws: Draws, *given: Any, **named: Any) -> Optimized:
        drawn.append(draws)
        return optimize(objective, draws, *given, **named)

    monkeypatch.setattr(adversarial_distillation, "optimize", kept)
    distilled(network, images, {})
    settings = DistillAdversariallySettings(**SHORT).synthesis
    starts = [
        each.start for each in (*drawn, Draws.of(0, range(4), (3, 32, 32), (images.amin(), images.amax()), 1, settings))
    ]
    for number, start in enumerate(starts):
        for other in starts[number + 1 :]:
            assert not torch.isclose(start, other).all(dim=(1, 2, 3)).any()
    assert drawn[0].offsets != drawn[1].offsets or drawn[0].flips != drawn[1].flips


class WithFeatures(nn.Module):
    """A model that gives features before its logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = self.network.forward_features(x)
        return {"features": tokens[:, 0], "logits": self.network.forward_head(tokens)}


@pytest.mark.parametrize("name", ["logits", "features and logits", "features"])
def test_images_get_a_class_where_the_model_has_classes(network, images, monkeypatch, name: str) -> None:
    headless = timm.create_model("vit_tiny_patch16_224", **{**ARGUMENTS, "num_classes": 0}).eval()
    given = {"logits": network, "features and logits": WithFeatures(network).eval(), "features": headless}[name]
    seen: list[tuple[Objective, Draws]] = []
    optimize = adversarial_distillation.optimize

    def kept(objective: Objective, draws: Draws, *rest: Any, **named: Any) -> Optimized:
        seen.append((objective, draws))
        return optimize(objective, draws, *rest, **named)

    monkeypatch.setattr(adversarial_distillation, "optimize", kept)
    distilled(given, images, {"images": 40, "iterations": 1})
    for objective, draws in seen:
        losses = objective.losses(images, draws.classes[:8], draws.targets[:8])
        if name == "features":
            assert not losses.classes.any()
        else:
            assert len(draws.classes.unique()) > 5
            wanted = nn.functional.cross_entropy(network(images), draws.classes[:8], reduction="none")
            torch.testing.assert_close(losses.classes, wanted)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 6))
def test_the_buffer_keeps_the_latest(most: int, in_a_cycle: int, cycles: int) -> None:
    buffer = adversarial_distillation._Buffer(torch.full((2, 1), -1.0), most, {})
    for cycle in range(cycles):
        buffer.add(cycle, torch.arange(cycle * in_a_cycle, (cycle + 1) * in_a_cycle).float()[:, None])
    latest = list(range(cycles * in_a_cycle))[-most:]
    drawn = buffer.drawn(0, 3, 1000).flatten().tolist()
    assert sorted(drawn) == [-1.0, -1.0, *map(float, latest)]
    assert sum(map(len, buffer.made.values())) < most + in_a_cycle
    assert buffer.drawn(0, 3, 3).flatten().tolist() == drawn[:3]


def test_a_model_without_attention_is_refused_before_its_images_are_read() -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Conv2d(3, 4, 8, 8), nn.Linear(16, 5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            patches = self.embedding(images).flatten(2)
            return self.head((patches @ patches.transpose(1, 2)).flatten(1))

    model: Any = CapturedModel(capture(Squares().eval(), torch.randn(2, 3, 32, 32)), (3, 32, 32))
    with pytest.raises(ModelError, match="no attention"):
        check_attention(model, DistillAdversariallySettings())
    check_attention(model, DistillAdversariallySettings(iterations=0))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"cycles": 0}, "cycles = 0: it is a whole number"),
        ({"batch": 1.5}, "batch = 1.5: it is a whole number"),
        ({"iterations": -1}, "iterations = -1"),
        ({"disagreement": -1.0}, "disagreement = -1"),
        ({"disagreement": math.nan}, "disagreement = nan"),
        ({"weights": 1.0}, "weights = 1"),
        ({"rate": 5000.0}, "rate = 5000"),
        ({"variation_weight": -1.0}, "variation_weight = -1"),
    ],
)
def test_numbers_without_meaning_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        DistillAdversariallySettings(**wrong)  # type: ignore[arg-type]

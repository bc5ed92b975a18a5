"""Images that are made from a model: the optimization, its draws and limits, and the images as files."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

import vitquant
from vitquant.errors import CalibrationError, CheckpointError, ExportError, ModelError, RecipeError
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.image_folders import load_unlabelled
from vitquant.objectives.total_variation import total_variation
from vitquant.synthesis import patch_similarity
from vitquant.synthesis.patch_similarity import Draws, Objective, PatchSimilaritySettings, optimize
from vitquant.synthesis.patches import PatchFeatures
from vitquant.synthetic_images import SynthesisStoppedError, SyntheticImages, check_synthesis
from vitquant.tasks.images import batches
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.workers.ranks import Ranks

ARGUMENTS = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 10}
STEPS = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
LIMITS = torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0)
SHORT = {"iterations": 4, "warmup": 2}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **ARGUMENTS).eval()


def captured(model: nn.Module, size: int = 32) -> CapturedModel:
    example = torch.randn(2, 3, size, size).to(next(model.parameters()))
    return CapturedModel(capture(model, example), (3, size, size))


def direct_entropy(features: Tensor, bandwidth: float, points: int) -> Tensor:
    """Of one image, (patches, channels), by the formula with a number for every pair and point."""
    unit = functional.normalize(features, dim=-1)
    pairs = (unit @ unit.T).flatten()
    positions = torch.linspace(pairs.min().item(), pairs.max().item(), points, dtype=features.dtype)
    kernels = (-0.5 * ((positions[:, None] - pairs) / bandwidth) ** 2).exp() / (bandwidth * math.sqrt(2 * math.pi))
    density = kernels.mean(1) + 1e-4
    return -torch.trapezoid(density * density.log(), positions)


def test_the_optimization_is_the_published_one_in_float64(model: nn.Module) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS).double().eval()
    settings = PatchSimilaritySettings(iterations=3, jitter=(15, 100), warmup=2, bandwidth=0.2, variation_weight=0.01)
    draws = Draws.of(5, (0, 1, 2), (3, 32, 32), LIMITS, 10, settings)
    draws = Draws(draws.start.double(), draws.classes, draws.targets, draws.offsets, draws.flips)
    limits = torch.full((3, 1, 1), -1.5).double(), torch.full((3, 1, 1), 1.25).double()
    found = optimize(Objective.of(captured(model), settings, "output"), draws, limits, at_once=2)
    assert any(draws.offsets)
    assert set(draws.flips) == {True, False}

    contexts: list[Tensor] = []
    for block in model.blocks:
        block.attn.proj.register_forward_pre_hook(lambda _, inputs: contexts.append(inputs[0]))
    images, traces = draws.start.clone(), []
    for step in range(6):
        if step % 3 == 0:
            first, second = torch.zeros_like(images), torch.zeros_like(images)
        images.requires_grad_(True)
        contexts.clear()
        moved = images.roll((draws.offsets[step], draws.offsets[step]), (2, 3))
        moved = moved.flip(3) if draws.flips[step] else moved
        logits = model(moved)
        losses = []
        for number in range(3):
            entropy = 0.0
            for context in contexts:
                patches = context[number].unflatten(-1, (3, 8)).mean(1)[1:]
                entropy = entropy + direct_entropy(patches, 0.2, 10)
            cross = -logits[number].log_softmax(0)[draws.classes[number]]
            distance = (total_variation(moved)[number] - draws.targets[number]).abs()
            losses.append(torch.stack([entropy, cross, distance, torch.zeros_like(cross)]))
        parts = torch.stack(losses)
        total = (-parts[:, 0] + parts[:, 1] + 0.01 * parts[:, 2]).sum()
        gradient = torch.autograd.grad(total, images)[0]
        t = step % 3 + 1
        rate = 0.2 * t / 2 if t <= 2 else 0.2 * 0.5 * (1 + math.cos(0))
        first, second = 0.5 * first + 0.5 * gradient, 0.9 * second + 0.1 * gradient**2
        moved_by = rate * (first / (1 - 0.5**t)) / ((second / (1 - 0.9**t)).sqrt() + 1e-8)
        images = (images.detach() - moved_by).clamp(-1.5, 1.25)
        traces.append(parts.detach().mean(0).tolist())
    torch.testing.assert_close(found.images, images, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found.trace), torch.tensor(traces))


def test_images_do_not_depend_on_how_many_others_there_are_and_how_many_are_computed_at_a_time(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = vitquant.synthesize(model, 5, settings=SHORT, preprocessing=STEPS, seed=3)
    monkeypatch.setattr("vitquant.synthesis.patch_similarity._AT_ONCE", 2)
    monkeypatch.setattr("vitquant.synthetic_images._SET", 2)
    few = vitquant.synthesize(model, 3, settings=SHORT, preprocessing=STEPS, seed=3)
    assert len(few.about["losses"]) == 2
    differences = (several.pixels[:3].int() - few.pixels.int()).abs()
    assert differences.max() <= 2  # sums are rounded otherwise
    assert differences.float().mean() < 0.01
    other = vitquant.synthesize(model, 3, settings=SHORT, preprocessing=STEPS, seed=4)
    assert (other.pixels.int() - few.pixels.int()).abs().float().mean() > 10


def test_the_model_is_not_changed_and_the_same_seed_gives_the_same_images(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    once, again = (vitquant.synthesize(model, 2, settings=SHORT, preprocessing=STEPS) for _ in range(2))
    assert torch.equal(once.pixels, again.pixels)
    assert once.about == again.about
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(each.requires_grad and each.grad is None for each in model.parameters())


def test_the_entropy_rises(model: nn.Module) -> None:
    images = vitquant.synthesize(model, 4, settings={"iterations": 40, "warmup": 10}, preprocessing=STEPS)
    first, last = images.ends_of_losses["entropy"]
    assert last > first + 0.1


def test_an_interrupted_synthesis_continues_bit_for_bit(model: nn.Module, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("vitquant.synthetic_images._SET", 2)
    monkeypatch.setattr("vitquant.work._EVERY", 0.0)
    monkeypatch.setattr("vitquant.work._SHARE", math.inf)
    given = {"settings": {"iterations": 5, "warmup": 2}, "preprocessing": STEPS, "seed": 1}
    whole = vitquant.synthesize(model, 3, **given)
    steps = 0

    def interrupt(what: str, done: int, total: int) -> None:
        nonlocal steps
        steps += 1
        assert total == 20
        if steps in (3, 8, 16):  # in both stages of the first set, and in the second
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            vitquant.synthesize(model, 3, work=tmp_path / "work", progress=interrupt, **given)
    continued = vitquant.synthesize(model, 3, work=tmp_path / "work", progress=interrupt, **given)
    assert steps <= 20 + 3  # an interrupted iteration is not saved
    assert torch.equal(continued.pixels, whole.pixels)
    assert continued.about == whole.about
    with pytest.raises(CheckpointError, match="another run, with another synthesis"):
        vitquant.synthesize(model, 3, work=tmp_path / "work", **{**given, "seed": 2})
    saved = tmp_path / "work" / "set-0.safetensors"
    saved.write_bytes(saved.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"set-0\.safetensors is damaged"):
        vitquant.synthesize(model, 3, work=tmp_path / "work", **given)


def test_the_time_limit_ends_with_the_images_so_far(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitquant.synthetic_images._SET", 2)
    images = vitquant.synthesize(model, 3, settings=SHORT, preprocessing=STEPS, time_limit=0)
    assert len(images) == 2
    assert images.cut_short == "2 of 3 images, 0 of 8 iterations"
    assert images.ends_of_losses == {}


def test_a_loss_that_is_not_a_number_ends_with_the_last_good_images(model: nn.Module, monkeypatch) -> None:
    entropy, calls = patch_similarity.patch_entropy, 0

    def breaking(*args: object) -> Tensor:
        nonlocal calls
        calls += 1
        return entropy(*args) * (math.nan if calls > 10 else 1)  # the first four measure the memory

    settings = {"iterations": 3, "jitter": [0, 0]}
    good = vitquant.synthesize(model, 2, settings={**settings, "jitter": [0]}, preprocessing=STEPS)
    monkeypatch.setattr(patch_similarity, "patch_entropy", breaking)
    with pytest.raises(SynthesisStoppedError, match="not finite in iteration 4 of 6; lower the rate") as stopped:
        vitquant.synthesize(model, 2, settings=settings, preprocessing=STEPS)
    assert stopped.value.images.cut_short == "3 of 6 iterations"
    assert stopped.value.images.pixels.shape == good.pixels.shape


@pytest.mark.parametrize(
    ("name", "size", "tokens", "dropped"),
    [
        ("vit_tiny_patch16_224", 32, 17, [0]),
        ("deit_tiny_distilled_patch16_224", 32, 18, [0, 1]),
        ("vit_small_patch14_reg4_dinov2", 28, 9, [0, 1, 2, 3, 4]),
    ],
)
def test_tokens_that_are_no_patches_are_left_out(name: str, size: int, tokens: int, dropped: list[int]) -> None:
    patch = {"patch_size": 8} if size == 32 else {}
    network = timm.create_model(name, img_size=size, depth=1, embed_dim=24, num_heads=3, **patch).eval()
    features = PatchFeatures.of(captured(network, size))
    assert [each.tolist() for each in features.patches] == [[n for n in range(tokens) if n not in dropped]]


def test_windows_of_an_image_are_gathered() -> None:
    network = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=12, depths=(2, 1), num_heads=(2, 2), num_classes=5
    ).eval()
    model = captured(network, 56)
    features = PatchFeatures.of(model)
    assert features.patches == (None,) * 3
    shapes = []
    contexts = model.segment("images", features.sites)(torch.randn(2, 3, 56, 56))
    for each in features.split(contexts, 2):
        shapes.append(tuple(each.shape))
    assert shapes == [(2, 4, 49, 6), (2, 4, 49, 6), (2, 1, 49, 12)]
    images = vitquant.synthesize(network, 2, settings=SHORT, preprocessing={**STEPS, "input_size": [3, 56, 56]})
    assert images.ends_of_losses["entropy"][0] != 0


def test_a_model_without_classes_has_no_class_prior(model: nn.Module) -> None:
    headless = timm.create_model("vit_tiny_patch16_224", **{**ARGUMENTS, "num_classes": 0}).eval()
    images = vitquant.synthesize(headless, 2, settings=SHORT, preprocessing=STEPS)
    assert images.ends_of_losses["cross entropy"] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"count": 0}, RecipeError, "0 images: it is a whole number from 1 to 10,000"),
        ({"method": "psaq"}, RecipeError, "'psaq' is unknown; did you mean psaq-vit"),
        ({"settings": {"iteration": 5}}, RecipeError, "did you mean 'iterations'"),
        ({"settings": ["iterations"]}, RecipeError, "write KEY=VALUE"),
        ({"settings": ["points=1"]}, RecipeError, "points = 1: it is a whole number from 2"),
        ({"settings": ["rate=nan"]}, RecipeError, "rate"),
        ({"settings": {"jitter": [300]}}, RecipeError, "jitter"),
        ({"settings": {"jitter": []}}, RecipeError, "jitter"),
        ({"settings": {"precision": "float16"}}, RecipeError, "precision = 'float16': it is float32, or bfloat16"),
        ({"settings": {"start": "noise"}}, RecipeError, "start = 'noise': it is gaussian-noise, or uniform-noise, or"),
        ({"method": "psaq-vit", "settings": {"start": 3}}, RecipeError, "start"),
        ({"method": "uniform-noise", "settings": {"iterations": 5}}, RecipeError, "iterations"),
        ({"memory": 1e-6}, CalibrationError, "a gradient for one image takes .* GB"),
        ({"memory": -1.0}, RecipeError, "memory = -1.0"),
        ({"memory": math.inf}, RecipeError, "memory = inf"),
        ({"time_limit": -1}, RecipeError, "time_limit = -1"),
    ],
)
def test_what_cannot_be_made_is_refused(model: nn.Module, given: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        vitquant.synthesize(model, **{"count": 2, "settings": SHORT, "preprocessing": STEPS, **given})


def test_the_model_may_be_computed_in_half_precision(model: nn.Module) -> None:
    whole, half = (
        vitquant.synthesize(model, 2, settings={**SHORT, "precision": precision}, preprocessing=STEPS)
        for precision in ("float32", "bfloat16")
    )
    assert not torch.equal(whole.pixels, half.pixels)
    for name, (first, _) in whole.ends_of_losses.items():
        assert half.ends_of_losses[name][0] == pytest.approx(first, rel=0.1)
    given = copy.deepcopy(model).to(torch.bfloat16)
    assert vitquant.synthesize(given, 2, settings=SHORT, preprocessing=STEPS).pixels.shape == (2, 3, 32, 32)
    assert next(given.parameters()).dtype == torch.bfloat16


def of_libraries() -> dict[str, Callable[[], nn.Module]]:
    import torchvision
    from transformers import DeiTConfig, DeiTForImageClassification, SwinConfig, SwinForImageClassification

    small = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    windows = {"image_size": 32, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 1, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 24}
    return {
        "transformers deit": lambda: DeiTForImageClassification(DeiTConfig(**small)),
        "transformers swin": lambda: SwinForImageClassification(SwinConfig(**windows)),
        "torchvision vit": lambda: torchvision.models.VisionTransformer(**sizes, num_classes=10),
        "logits and features": lambda: LogitsAndFeatures(),
    }


class LogitsAndFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.vit.forward_features(images)
        return {"features": features, "logits": self.vit.forward_head(features)}


@pytest.mark.parametrize("name", ["transformers deit", "transformers swin", "torchvision vit", "logits and features"])
def test_images_are_made_for_the_models_of_every_library(name: str) -> None:
    torch.manual_seed(0)
    network = of_libraries()[name]().eval()
    images = vitquant.synthesize(network, 2, "psaq-vit", settings=SHORT, preprocessing=STEPS)
    assert images.ends_of_losses["entropy"][0] != images.ends_of_losses["entropy"][1]
    assert images.ends_of_losses["cross entropy"][0] > 0  # each has classes


def test_a_gradient_that_is_not_a_number_leaves_the_images_as_they_were(model: nn.Module, monkeypatch) -> None:
    class Breaking(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * (math.nan if calls > 4 else 1)

    variation, calls = patch_similarity.total_variation, 0

    def breaking(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return variation(Breaking.apply(images))

    given = {"settings": {"iterations": 2, "jitter": [0]}, "preprocessing": STEPS}
    good = vitquant.synthesize(model, 2, **given)
    monkeypatch.setattr(patch_similarity, "total_variation", breaking)
    given["settings"] = {"iterations": 3, "jitter": [0]}
    with pytest.raises(SynthesisStoppedError, match="gradient is not finite in iteration 3 of 3") as stopped:
        vitquant.synthesize(model, 2, **given)
    assert stopped.value.images.pixels.float().std() == pytest.approx(good.pixels.float().std().item(), rel=0.2)


def test_sets_that_were_not_begun_are_left_out_of_the_losses() -> None:
    begun = {"entropy": [1.0, 3.0], "cross entropy": [0.0, 0.0], "distance of the total variation": [5.0, 4.0]}
    about = {"asked": 4, "iterations": 2, "losses": [begun, {name: [] for name in begun}]}
    images = SyntheticImages(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), about, Preprocessing(input_size=(3, 2, 2)))
    assert images.ends_of_losses["entropy"] == (1.0, 3.0)
    assert images.cut_short == "0 of 2 iterations"


def test_in_inference_mode_images_are_made_but_not_for_a_model_of_it(model: nn.Module) -> None:
    with torch.inference_mode():
        made = vitquant.synthesize(model, 2, settings=SHORT, preprocessing=STEPS)
        network = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS).eval()
        with pytest.raises(ModelError, match="inference_mode"):
            vitquant.synthesize(network, 2, settings=SHORT, preprocessing=STEPS)
    assert torch.equal(made.pixels, vitquant.synthesize(model, 2, settings=SHORT, preprocessing=STEPS).pixels)


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ModelError, match="no parameters"):
        vitquant.synthesize(nn.Identity(), 2, preprocessing=STEPS)


def test_a_set_that_is_there_is_replaced_as_a_whole_or_not_at_all(model: nn.Module, tmp_path: Path) -> None:
    many, few = (vitquant.synthesize(model, n, "uniform-noise", preprocessing=STEPS) for n in (5, 2))
    many.save(tmp_path / "made")
    with pytest.raises(ExportError, match="is not empty"):
        few.save(tmp_path / "made")
    few.save(tmp_path / "made", force=True)
    assert len(load_unlabelled(tmp_path / "made")) == 2
    with pytest.raises(ExportError, match="no place for files"):
        few.save("/proc/made")
    own = tmp_path / "own"
    own.mkdir()
    (own / "contact-sheet.png").write_bytes((tmp_path / "made" / "0000.png").read_bytes())
    assert len(load_unlabelled(own)) == 1  # a user's own image of that name


def test_a_model_without_attention_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 5)).eval()
    with pytest.raises(ModelError, match="no attention"):
        vitquant.synthesize(network, 2, preprocessing=STEPS)
    noise = vitquant.synthesize(network, 2, "gaussian-noise", preprocessing=STEPS)
    assert noise.pixels.shape == (2, 3, 32, 32)


def test_noise_is_what_it_says() -> None:
    steps = {"mean": [0.5] * 3, "std": [0.1] * 3}
    gaussian, uniform = (
        torch.cat(vitquant.synthesize(nn.Identity(), 2, f"{kind}-noise", preprocessing=steps).batches())
        for kind in ("gaussian", "uniform")
    )
    assert abs(gaussian.mean()) < 0.01
    assert abs(gaussian.std() - 1) < 0.01
    assert abs(gaussian[0] * gaussian[1]).mean() < 1  # of independent images
    assert abs(uniform.min() + 5) < 1e-5
    assert abs(uniform.max() - 5) < 1e-5
    assert abs(uniform.std() - 10 / math.sqrt(12)) < 0.01


def test_the_published_method_is_the_published_one() -> None:
    published = check_synthesis(1, "psaq-vit", ())
    assert published == PatchSimilaritySettings()
    assert (published.start, published.iterations, published.jitter) == ("gaussian-noise", 500, (15, 30))
    assert (published.rate, published.warmup, published.class_weight, published.variation_weight) == (0.2, 100, 1, 0.05)
    assert check_synthesis(1, "psaq-vit-leaves", {"start": "gaussian-noise"}).start == "gaussian-noise"


@pytest.mark.parametrize("method", ["psaq-vit", "psaq-vit-leaves"])
@pytest.mark.parametrize("start", ["gaussian-noise", "uniform-noise", "dead-leaves"])
def test_images_begin_with_what_is_asked_for(model: nn.Module, method: str, start: str) -> None:
    given: dict = {"count": 2, "preprocessing": STEPS, "seed": 3}
    begun = vitquant.synthesize(model, method=method, settings=["iterations=1", "rate=0", f"start={start}"], **given)
    assert torch.equal(begun.pixels, vitquant.synthesize(model, method=start, **given).pixels)


def test_saved_images_are_read_as_the_same_tensors(model: nn.Module, tmp_path: Path) -> None:
    images = vitquant.synthesize(model, 3, settings=SHORT, preprocessing={**STEPS, "crop_pct": 0.8})
    images.save(tmp_path / "made")
    read = batches(load_unlabelled(tmp_path / "made"), Preprocessing.from_dict({**STEPS, "crop_pct": 0.8}), 2)
    for (found, _), expected in zip(read, images.batches(2), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_psaq_vit_leaves_probabilities_and_the_input_of_gelu_in_float(model: nn.Module) -> None:
    quantized = vitquant.quantize(model, "psaq-vit", [torch.randn(4, 3, 32, 32)], bits="w4a8")
    left = set(quantized.assignments) - set(quantized.quantized_names)
    kinds = {quantized.index.value(name).readers[0].kind for name in left}
    operands = {quantized.index.value(name).readers[0].operand for name in left}
    assert (kinds, operands) == ({"context", "activation"}, {"probs", "input"})


@pytest.mark.parametrize("count", range(6))
def test_processes_share_the_work_without_gap_or_overlap(count: int) -> None:
    for processes in (1, 2, 4):
        parts = [Ranks(rank, processes).part(count) for rank in range(processes)]
        assert [number for part in parts for number in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1

"""Reconstruction of the output: its error against float64, and its steps against gradients written out."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import ZOO, Handwritten, vary
from hypothesis import example, given, settings
from hypothesis import strategies as st

import vitquant
from vitquant.errors import CalibrationError, RecipeError
from vitquant.graph.segments import Segment
from vitquant.graph.taps import TappedInterpreter
from vitquant.methods.context import Context
from vitquant.methods.output_reconstruction import ReconstructOutputSettings, reconstruct_output
from vitquant.methods.student import Student
from vitquant.model import QuantizedModel
from vitquant.model.saved import digest
from vitquant.model.simulation import ExactSimulation
from vitquant.objectives.relative_error import relative_error, shift_free_error
from vitquant.recipe import load_recipe
from vitquant.recipe.rule import Rule
from vitquant.runtime.on_images import interpreted
from vitquant.spec import PowerOfTwoScale


@settings(max_examples=50, deadline=None)
@example(seed=56, images=1, classes=2, common=4.0)
@given(seed=st.integers(0, 10_000), images=st.integers(1, 5), classes=st.integers(2, 20), common=st.floats(-10, 10))
def test_the_error_is_a_share_of_the_squares_without_what_classes_have_in_common(
    seed: int, images: int, classes: int, common: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    expected, found = torch.randn(2, images, classes, generator=generator).unbind()
    reference = []
    for y, y_hat in zip(expected.double().tolist(), found.double().tolist(), strict=True):
        mean, mean_hat = sum(y) / classes, sum(y_hat) / classes
        change = sum(((a - mean) - (b - mean_hat)) ** 2 for a, b in zip(y, y_hat, strict=True))
        reference.append(change / sum((a - mean) ** 2 for a in y))
    error = shift_free_error(found, expected)
    torch.testing.assert_close(error.double(), torch.tensor(reference, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    expected, found = expected.double(), found.double()  # in float32 a shift rounds classes that are nearly equal
    assert bool((shift_free_error(expected + common, expected) < 1e-8).all())
    torch.testing.assert_close(shift_free_error(found + common, expected), error.double(), rtol=1e-3, atol=1e-4)


def test_the_error_of_constant_outputs_is_a_number() -> None:
    assert shift_free_error(torch.zeros(2, 5), torch.ones(2, 5)).tolist() == [0, 0]


def made(name: str, recipe: str = "repq-vit", bits: str = "w4a4") -> tuple[QuantizedModel, torch.Tensor]:
    build, size = ZOO[name]
    torch.manual_seed(0)
    model = build().eval()
    vary(model)
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    return vitquant.quantize(model, recipe, [images], bits=bits, simulated=True), images


class Teacher:
    """The float model that a quantized one was made from, folded as that is."""

    def __init__(self, model: QuantizedModel) -> None:
        self.model = copy.deepcopy(model)

    def segment(self, inputs: str, outputs: list[str]) -> Segment:
        return self.model.segment(inputs, outputs, quantized=False)


def given_to(model: QuantizedModel, data: Iterable[torch.Tensor], **others: Any) -> Context:
    return Context(data, output_errors=(shift_free_error,), teacher=Teacher(model), **others)  # type: ignore[arg-type]


@torch.no_grad()
def floats(model: QuantizedModel, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The float output, and what every norm gives."""
    held: dict[str, torch.Tensor] = {}
    norms = [site.node for site in model.sites if site.kind == "layer_norm"]
    taps = {node: [lambda x, node=node: held.__setitem__(node, x.clone())] for node in norms}
    return TappedInterpreter(model.graph_module, model.graph_module.graph, taps, False).run(images), held


def gradients(model: QuantizedModel, images: torch.Tensor, norms: float) -> dict[str, torch.Tensor]:
    """Of the mean error to every stored tensor, and to the logarithm of every activation's scale."""
    expected, of_norms = floats(model, images)
    learned = dict(model.graph_module.named_parameters())
    scales = {}
    for name, quantizer in model.quantizers.items():
        if model.index.value(name).parameter is None:
            scales[name] = torch.zeros_like(quantizer.scale, requires_grad=True)
            quantizer.scale = quantizer.scale * scales[name].exp()
    with torch.enable_grad():
        for each in learned.values():
            each.requires_grad_(True)
        held: dict[str, torch.Tensor] = {}
        taps = {node: [lambda x, node=node: held.__setitem__(node, x)] for node in of_norms}
        output = TappedInterpreter(model.graph_module, model.graph_module.graph, taps, True).run(images)
        error = shift_free_error(output, expected).mean()
        for node, x in of_norms.items():
            error = error + norms * relative_error(held[node], x).mean() / len(of_norms)
        found = torch.autograd.grad(error, [*learned.values(), *scales.values()], allow_unused=True)
    return dict(zip([*learned, *scales], found, strict=True))


@pytest.mark.parametrize("norms", [0.0, 30.0])
def test_the_first_step_goes_down_the_gradient_of_the_mean_error(norms: float) -> None:
    model, images = made("timm deit")
    other, _ = made("timm deit")
    slopes = gradients(other, images, norms)
    before = {name: p.detach().clone() for name, p in model.graph_module.named_parameters()}
    scales = {name: quantizer.scale.clone() for name, quantizer in model.quantizers.items()}
    rates = {"weights": 2e-2, "others": 3e-3, "scales": 4e-3}
    reconstruct_output(model, given_to(model, [images]), ReconstructOutputSettings(1, **rates, norms=norms))
    quantizers = {
        model.index.value(name).parameter: q for name, q in model.quantizers.items() if name.endswith(":weight")
    }
    assert len(quantizers) == len([name for name in before if before[name].ndim > 1]) - 2  # two embeddings
    moved = 0
    for name, parameter in model.graph_module.named_parameters():
        quantizer = quantizers.get(name)
        rate = rates["others"] if quantizer is None else rates["weights"] * float(quantizer.step.mean())
        steep = slopes[name].abs() > 1e-5  # Adam's first step has the size of its rate, whatever the slope
        expected_step = (-rate * slopes[name].sign())[steep]
        torch.testing.assert_close((parameter.detach() - before[name])[steep], expected_step, rtol=0.02, atol=1e-6)
        moved += int(steep.sum())
    assert moved > 1000
    moved = 0
    for name, quantizer in model.quantizers.items():
        if model.index.value(name).parameter is not None:
            assert torch.equal(quantizer.scale, scales[name])  # a weight's stays
        elif slopes[name] is not None and slopes[name].abs() > 1e-5:
            step = (quantizer.scale / scales[name]).log()
            torch.testing.assert_close(step, -rates["scales"] * slopes[name].sign(), rtol=0.02, atol=1e-6)
            moved += 1
    assert moved > 5


@pytest.mark.parametrize(
    "name", ["timm deit", "timm swin", "transformers vit", "torchvision vit", "encoder post-norm relu"]
)
def test_the_error_falls_in_every_library(name: str) -> None:
    model, images = made(name, bits="w3a8")  # what 3-bit weights lose can be learned, the noise of activations not
    quick = ReconstructOutputSettings(steps=30, weights=1e-2, others=2e-4, scales=1e-3)
    record = reconstruct_output(model, given_to(model, [images]), quick)
    first, last = (record.summary[f"output error, {which} pass"] for which in ("first", "last"))
    assert last < 0.3 * first
    assert record.summary["steps"] == 30


def test_steps_are_of_the_batch_in_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = made("timm deit")
    seen: list[torch.Tensor] = []
    real = Student.losses

    def spied(self: Student, images: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(images)
        return real(self, images, share)

    monkeypatch.setattr(Student, "losses", spied)
    said: list[tuple[int, int]] = []
    context = given_to(model, images.split(5), progress=lambda _, done, total: said.append((done, total)))
    record = reconstruct_output(model, context, ReconstructOutputSettings(10, batch=2))
    parts = [(0, 2), (2, 4), (4, 5), (5, 7), (7, 8)]
    expected = [images[first:last] for first, last in parts + parts]
    assert all(torch.equal(*pair) for pair in zip(seen, expected, strict=True))
    assert (record.summary["steps"], record.summary["images"], said) == (10, 8, [(n, 10) for n in range(11)])


def test_the_result_is_plain_saves_loads_and_lowers(tmp_path) -> None:
    build, size = ZOO["timm deit"]
    torch.manual_seed(0)
    network = build().eval()
    weights = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    images = torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(0))
    recipe, steps = "repq-vit+reconstructed-output+fully-integer+wide-residual", ["reconstruct-output.steps=6"]
    model = vitquant.quantize(network, recipe, images.split(3), bits="w6a6s5", settings=steps)
    again = vitquant.quantize(network, recipe, images.split(3), bits="w6a6s5", settings=steps)
    assert digest(model) == digest(again)
    without = vitquant.quantize(network, recipe.replace("+reconstructed-output", ""), images.split(3), bits="w6a6s5")
    assert digest(model) != digest(without)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in network.state_dict().items())
    assert not any(tensor.requires_grad for tensor in model.buffers())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.save(tmp_path / "out")
    assert torch.equal(vitquant.load(tmp_path / "out", model=network)(images), model(images))
    assert torch.equal(interpreted(vitquant.lower(model))(images), ExactSimulation(model)(images).float())


def test_weights_in_float_stay() -> None:
    build, size = ZOO["timm deit"]
    torch.manual_seed(0)
    network = build().eval()
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    recipe = load_recipe("repq-vit+reconstructed-output")
    recipe = replace(recipe, rules=(*recipe.rules, Rule("head", site=("head",))))
    model = vitquant.quantize(network, recipe, [images], bits="w4a4", settings=["reconstruct-output.steps=4"])
    found = dict(model.graph_module.named_parameters())
    assert torch.equal(found["head.weight"], network.head.weight)
    assert not torch.equal(found["head.bias"], network.head.bias)


def test_scales_that_are_powers_of_two_stay_so() -> None:
    model, images = made("timm deit", "repq-vit+power-of-two-factor")
    reconstruct_output(model, given_to(model, [images]), ReconstructOutputSettings(steps=2, scales=0.1))
    powers = [q.scale for q in model.quantizers.values() if isinstance(q.spec.scheme, PowerOfTwoScale)]
    for scale in powers:
        assert torch.equal(scale.log2(), scale.log2().round())


def test_what_cannot_be_reconstructed_is_refused() -> None:
    model, images = made("timm deit")
    with pytest.raises(CalibrationError, match="no calibration images"):
        reconstruct_output(model, given_to(model, []), ReconstructOutputSettings())
    with pytest.raises(CalibrationError, match="cannot be gone through again"):
        reconstruct_output(model, given_to(model, iter([images])), ReconstructOutputSettings())
    for parameter in model.graph_module.parameters():
        with torch.no_grad():
            parameter.mul_(1e30)
    with pytest.raises(CalibrationError, match=r"step 1 of 2: lower weights, others and scales"):
        reconstruct_output(model, given_to(model, [images]), ReconstructOutputSettings(steps=2))
    assert not any(tensor.requires_grad for tensor in model.buffers())


@torch.library.custom_op("vitquant_reconstruction_tests::constant", mutates_args=())
def without_gradients(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


without_gradients.register_fake(lambda x: torch.empty_like(x))


def test_a_model_without_gradients_is_refused_in_one_line() -> None:
    class Custom(Handwritten):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return without_gradients(super().forward(x))

    torch.manual_seed(0)
    with pytest.raises(
        CalibrationError, match="reconstruct-output: torch computes no gradients of this model"
    ) as refused:
        vitquant.quantize(Custom().eval(), "minmax+reconstructed-output", [torch.randn(4, 3, 32, 32)])
    assert "\n" not in str(refused.value)


def test_in_inference_mode_images_may_be_but_the_model_may_not() -> None:
    model, images = made("timm deit")
    with torch.inference_mode():
        reconstruct_output(model, given_to(model, [images.clone()]), ReconstructOutputSettings(steps=1))
    build, _ = ZOO["timm deit"]
    network = build().eval()
    with torch.inference_mode(), pytest.raises(CalibrationError, match="quantize it outside"):
        vitquant.quantize(network, "repq-vit+reconstructed-output", [images])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "whole number"),
        ({"batch": 1.5}, "whole number"),
        ({"norms": -1.0}, "at least 0"),
        ({"norms": float("inf")}, "at least 0"),
        ({"weights": -1.0}, "at least 0"),
        ({"scales": float("nan")}, "at least 0"),
    ],
)
def test_numbers_without_meaning_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        ReconstructOutputSettings(**wrong)  # type: ignore[arg-type]

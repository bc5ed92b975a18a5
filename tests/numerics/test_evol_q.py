"""Evol-Q: the losses and the weight correction against float64, and the search against one that computes everything."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from architectures import ZOO, vary
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vitquant
from vitquant.errors import CalibrationError, RecipeError
from vitquant.methods.context import Context
from vitquant.methods.evolving_block import EvolvingBlock
from vitquant.methods.recomputed import RecomputedSimulation
from vitquant.methods.scale_evolution import EvolveScalesSettings, evolve_scales
from vitquant.methods.weight_correction import CorrectWeightsSettings, correct_weights, correction, moments
from vitquant.model import QuantizedModel
from vitquant.objectives.output_loss import OUTPUT_LOSSES, infonce
from vitquant.recipe import Recipe, load_recipe
from vitquant.search.coordinate_descent import CoordinateDescent
from vitquant.search.evolution import Evolution, EvolutionSettings
from vitquant.search.genes import Genes, Search
from vitquant.search.random_search import RandomSearch

IMAGES = 7


ASYMMETRIC = ["weights.spec.signed=false", "weights.spec.symmetric=false"]


def made(
    name: str, recipe: str | Recipe = "minmax", bits: str = "w4a8", settings: Sequence[str] = ()
) -> tuple[QuantizedModel, Tensor]:
    build, size = ZOO[name]
    torch.manual_seed(0)
    model = build().eval()
    vary(model)
    images = torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    return vitquant.quantize(model, recipe, [images], bits=bits, simulated=True, settings=settings), images


class Teacher:
    """The float model that a quantized one was made from."""

    def __init__(self, model: QuantizedModel) -> None:
        self.model = copy.deepcopy(model)
        self.sites = model.sites

    def segment(self, inputs: str, outputs: list[str]) -> Any:
        return self.model.segment(inputs, outputs, quantized=False)


def context_of(model: QuantizedModel, data: Any, **others: Any) -> Context:
    return Context(data, teacher=Teacher(model), **others)  # type: ignore[arg-type]


# --- losses ---


def written_out(name: str, q: list[list[float]], k: list[list[float]]) -> list[float]:
    """The losses of methods.md, section 5.1, in plain Python."""

    def unit(x: list[float]) -> list[float]:
        length = math.sqrt(sum(each * each for each in x))
        return [each / length for each in x]

    def softmax(x: list[float]) -> list[float]:
        powers = [math.exp(each - max(x)) for each in x]
        return [each / sum(powers) for each in powers]

    if name == "mse":
        return [sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) / len(pair[0]) for pair in zip(q, k, strict=True)]
    if name == "cosine":
        return [1 - sum(a * b for a, b in zip(unit(x), unit(y), strict=True)) for x, y in zip(q, k, strict=True)]
    if name == "kl":
        pairs = [(softmax(x), softmax(y)) for x, y in zip(q, k, strict=True)]
        return [sum(b * math.log(b / a) for a, b in zip(*pair, strict=True)) for pair in pairs]
    temperature = 3.0
    losses = []
    for place, x in enumerate(q):
        scores = [sum(a * b for a, b in zip(unit(x), unit(y), strict=True)) / temperature for y in k]
        losses.append(-2 * temperature * math.log(softmax(scores)[place]))
    return losses


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(OUTPUT_LOSSES)), st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 20))
def test_losses_are_those_of_the_definitions(name: str, seed: int, images: int, classes: int) -> None:
    q, k = torch.randn(2, images, classes, generator=torch.Generator().manual_seed(seed)).unbind()
    found = OUTPUT_LOSSES[name](q, k)
    assert found.dtype == torch.float64
    expected = torch.tensor(written_out(name, q.double().tolist(), k.double().tolist()), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    maps = OUTPUT_LOSSES[name](q.view(images, 1, classes), k.view(images, 1, classes))
    assert torch.equal(maps, found)  # features of any shape are one row of numbers


@pytest.mark.parametrize("name", ["mse", "cosine", "kl"])
def test_losses_of_equal_outputs_are_zero(name: str) -> None:
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(OUTPUT_LOSSES[name](x, x), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_infonce_is_lowest_where_images_are_told_apart() -> None:
    x = torch.eye(4)
    assert infonce(x, x).mean() < infonce(x.flip(0), x).mean()
    assert infonce(x[:1], x[:1]).item() == 0


# --- weight correction ---


def test_quantized_weights_have_the_moments_of_the_float_ones_and_outputs_the_mean() -> None:
    model, images = made("timm deit", bits="w3a8", settings=ASYMMETRIC)
    layers = [site for site in model.sites if site.kind in ("linear", "conv")]
    floats = {site.name: model.parameter(model.index.read_by(site)["weight"]).detach().clone() for site in layers}
    codes = {name: each.encode(model.parameter(model.index.value(name))) for name, each in model.quantizers.items()
             if model.index.value(name).parameter is not None and name.endswith(":weight")}  # fmt: skip
    inputs = model.segment("images", [str(site.reader("input")) for site in layers], quantized=False)(images)
    biases = {site.name: model.graph_module.get_parameter(_bias(model, site)).detach().clone() for site in layers}
    with torch.no_grad():
        record = correct_weights(model, context_of(model, images.split(3)), CorrectWeightsSettings())
    assert record.summary["weights"] == len(layers)
    for site, x in zip(layers, inputs, strict=True):
        name = str(site.reader("weight"))
        quantizer, stored = model.quantizers[name], model.parameter(model.index.value(name)).detach()
        levels = quantizer(stored)
        before = floats[site.name].double().flatten(1)
        deviations = levels.double().flatten(1).std(1), before.std(1)
        torch.testing.assert_close(*deviations, rtol=1e-5, atol=1e-9)
        assert torch.equal(quantizer.encode(stored), codes[name])
        # What the published correction gives, W' = (Wq - mean) std(W) / std(Wq) + mean(W), in float64.
        published = levels.double().flatten(1)
        published = published - published.mean(1, keepdim=True) + before.mean(1, keepdim=True)
        corrected = model.graph_module.get_parameter(_bias(model, site)).detach().double()
        ours = _mean_output(site.kind, x.double(), levels.double(), corrected)
        theirs = _mean_output(site.kind, x.double(), published.view_as(levels), biases[site.name].double())
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def _bias(model: QuantizedModel, site: Any) -> str:
    node = next(each for each in model.graph_module.graph.nodes if each.name == site.node)
    return str(node.args[2].target)


def _mean_output(kind: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if kind == "linear":
        return torch.nn.functional.linear(x, weight, bias).flatten(0, -2).mean(0)
    return torch.nn.functional.conv2d(x, weight, bias, stride=weight.shape[2:]).mean((0, 2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_codes_stay_as_well(dtype: torch.dtype) -> None:
    build, size = ZOO["timm deit"]
    torch.manual_seed(0)
    model = build().eval()
    vary(model)
    images = torch.randn(4, 3, size, size).to(dtype)
    quantized = vitquant.quantize(model.to(dtype), "minmax", [images], bits="w4a8", settings=ASYMMETRIC)
    weights = {name: quantizer for name, quantizer in quantized.quantizers.items() if name.endswith(":weight")}
    before = {name: each.encode(quantized.parameter(quantized.index.value(name))) for name, each in weights.items()}
    with torch.no_grad():
        correct_weights(quantized, context_of(quantized, [images]), CorrectWeightsSettings())
    for name, codes in before.items():
        assert torch.equal(weights[name].encode(quantized.parameter(quantized.index.value(name))), codes)


def test_a_channel_of_equal_weights_is_shifted_only() -> None:
    wanted = moments(torch.randn(2, 8))
    found = correction(torch.ones(2, 8), wanted)
    assert found.ratio.tolist() == [1, 1]
    torch.testing.assert_close(found.shift, wanted[0] - 1)


def test_weights_without_a_scale_for_each_channel_are_left_as_they_are() -> None:
    model, images = made("untidy")  # ties the weights of two layers
    record = correct_weights(model, context_of(model, [images]), CorrectWeightsSettings())
    reasons = {each["as calibrated, because"] for each in record.decisions.values() if "as calibrated, because" in each}
    assert "several operations read it" in reasons


def test_correction_without_images_is_refused() -> None:
    model, _ = made("timm deit")
    with pytest.raises(CalibrationError, match="no calibration images"):
        correct_weights(model, context_of(model, []), CorrectWeightsSettings())


# --- the search ---

QUICK: dict[str, Any] = {
    "passes": 2, "cycles": 3, "population": 4, "sample": 3, "mutation": 0.05, "wide_mutation": 0.05, "relative": True,
}  # fmt: skip


def naive(model: QuantizedModel, data: list[Tensor], options: dict[str, Any], seed: int) -> tuple[list[Tensor], float]:
    """The search of methods.md, section 5.1, that runs the whole model for every child: scales, and the loss."""
    given = EvolveScalesSettings(**options)
    references = [_output(model, model.run(images, {}, quantized=False)) for images in data]

    def loss() -> float:
        pairs = zip(data, references, strict=True)
        losses = [OUTPUT_LOSSES[given.loss](_output(model, model(images)), each) for images, each in pairs]
        total = sum(each.sum().item() for each in losses)
        return total / sum(map(len, data))

    numbers = sorted(model.index.blocks, reverse=True)
    blocks = {
        number: EvolvingBlock(
            {
                name: quantizer
                for name, quantizer in model.quantizers.items()
                if name.startswith(f"blocks.{number}.") and name.endswith(":weight")
            },
            ("scale",),
        )
        for number in numbers
    }
    fitness = loss()
    genes = {
        number: block.genes(given.mutation, given.wide_mutation, given.relative) for number, block in blocks.items()
    }
    for turn in range(given.passes * len(numbers)):
        number = numbers[turn % len(numbers)]
        digits = hashlib.sha256(f"{seed} evolve-scales {turn}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(digits, "little") >> 1)
        evolution = searches(given, genes[number], fitness, generator)
        for _ in range(given.cycles):
            child = evolution.ask()
            blocks[number].put(child)
            evolution.tell(child, loss())
        best, fitness = evolution.best
        blocks[number].put(best)
        genes[number] = replace(genes[number], start=best)
    return [quantizer.scale for quantizer in model.quantizers.values()], fitness


def searches(given: EvolveScalesSettings, genes: Genes, fitness: float, generator: torch.Generator) -> Search:
    match given.search:
        case "random":
            return RandomSearch(genes, fitness, generator)
        case "coordinates":
            return CoordinateDescent(genes, fitness, generator)
    return Evolution(genes, fitness, EvolutionSettings(given.population, given.sample, given.rate), generator)


def _output(model: QuantizedModel, output: Any) -> Tensor:
    return next(iter(model.named_outputs(output).values()))


@pytest.mark.parametrize(
    ("name", "loss", "search"),
    [
        *(("timm deit", loss, "evolution") for loss in OUTPUT_LOSSES),
        ("timm swin", "infonce", "evolution"),
        ("transformers vit", "kl", "evolution"),
        ("timm deit", "mse", "random"),
        ("timm deit", "mse", "coordinates"),
    ],
)
def test_it_finds_what_the_search_that_computes_everything_finds(name: str, loss: str, search: str) -> None:
    model, images = made(name, settings=ASYMMETRIC)
    data = list(images.split(4))
    options = {**QUICK, "loss": loss, "search": search}
    other = copy.deepcopy(model)
    with torch.inference_mode(False), torch.no_grad():
        expected, last = naive(other, data, options, 3)
    record = evolve_scales(model, context_of(model, data, seed=3), EvolveScalesSettings(**options))
    found = [quantizer.scale for quantizer in model.quantizers.values()]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    losses = record.summary["loss after each pass"]
    assert losses[-1] == pytest.approx(last, rel=1e-9)
    assert record.summary["loss before"] > losses[-1]
    assert losses == sorted(losses, reverse=True)
    lowered = sum(each["loss lowered by"] for each in record.decisions.values())
    assert lowered == pytest.approx(record.summary["loss before"] - losses[-1], abs=1e-9)
    assert record.summary["evaluations"] == record.summary["of"] == 6 * len(model.index.blocks)


@pytest.mark.parametrize("name", ["timm deit", "timm cait", "encoder post-norm relu", "timm swin", "timm crossvit"])
def test_the_result_does_not_depend_on_the_memory(name: str) -> None:
    model, images = made(name, settings=ASYMMETRIC)
    data = list(images.split(4))
    settings = EvolveScalesSettings(**QUICK, operands=["weight", "input"])
    others = {memory: copy.deepcopy(model) for memory in (40e-6, 9e-6, 1e-9)}
    record = evolve_scales(model, context_of(model, data), settings)
    for memory, other in others.items():
        assert evolve_scales(other, context_of(other, data, memory=memory), settings) == record
        for one, two in zip(model.quantizers.values(), other.quantizers.values(), strict=True):
            assert torch.equal(one.scale, two.scale)


def test_no_more_is_held_than_the_budget_allows() -> None:
    model, images = made("timm deit")
    data, sizes = list(images.split(2)), [2, 2, 2, 1]
    changing: dict[int, tuple[str, ...]] = dict.fromkeys(model.index.blocks, ())
    with torch.inference_mode():
        whole = [tuple(model.named_outputs(model(each)).values()) for each in data]
        one = model.segment("images", "blocks.0.residual2")(images[:1]).nbytes
        for budget in (one * 14, one * 13, one * 7, one * 5, one):
            simulation = RecomputedSimulation(model, data, sizes, changing, budget)
            for number in sorted(changing, reverse=True):
                for pair in zip(simulation.outputs(number), whole, strict=True):
                    assert all(torch.equal(*tensors) for tensors in zip(*pair, strict=True))
                assert sum(map(simulation.nbytes, chain(*simulation.held._held.values()))) <= budget


def test_weights_keep_their_moments_while_their_scales_evolve() -> None:
    model, images = made("timm deit", bits="w3a8", settings=ASYMMETRIC)
    weights = {name: value for name, value in model.quantizers.items() if name.endswith(":weight")}
    before = {name: moments(each(model.parameter(model.index.value(name)))) for name, each in weights.items()}
    scales = {name: model.quantizers[name].scale.clone() for name in before}
    settings = EvolveScalesSettings(**{**QUICK, "mutation": 0.2}, keep_moments=True)
    record = evolve_scales(model, context_of(model, [images]), settings)
    assert record.summary["loss after each pass"][-1] < record.summary["loss before"]
    changed = [name for name, each in scales.items() if not torch.equal(each, model.quantizers[name].scale)]
    assert changed
    for name in changed:
        deviation = moments(model.quantizers[name](model.parameter(model.index.value(name))))[1]
        torch.testing.assert_close(deviation, before[name][1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("parameter", ["scale", "zero_point", "factor"])
def test_every_parameter_can_evolve_and_nothing_else_changes(parameter: str) -> None:
    recipe = load_recipe("evol-q")
    kept = tuple(method for method in recipe.methods if method.name in ("calibrate", "choose-factors"))
    model, images = made("timm deit", replace(recipe, methods=kept))
    before = {name: copy.deepcopy(each.state_dict()) for name, each in model.quantizers.items()}
    operands = ["weight"] if parameter != "factor" else ["input"]
    settings = EvolveScalesSettings(**{**QUICK, "passes": 6}, operands=operands, parameters=[parameter])
    record = evolve_scales(model, context_of(model, [images]), settings)
    assert record.summary["loss after each pass"][-1] < record.summary["loss before"]
    changed = {
        key
        for name, quantizer in model.quantizers.items()
        for key, each in quantizer.state_dict().items()
        if not torch.equal(each, before[name][key])
    }
    assert changed == {parameter}
    assert model.quantizers.keys() == before.keys()


def test_a_mutation_is_by_the_bits_of_the_scale() -> None:
    model, _ = made("timm deit", bits="w4a8")
    names = ("blocks.0.attn.qkv:weight", "blocks.0.attn.proj:input")
    block = EvolvingBlock({name: model.quantizers[name] for name in names}, ("scale",))
    genes = block.genes(1e-4, 1e-5, False)
    channels = model.quantizers[names[0]].scale.numel()
    assert genes.reach.tolist() == [1e-4] * channels + [1e-5]
    assert not bool(genes.relative.any())
    assert bool(block.genes(1e-4, 1e-5, True).relative.all())


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mutation": 0.0}, "mutation = 0.0: it is positive and finite"),
        ({"mutation": 1.0, "relative": True}, "below 1: more could make a scale zero or negative"),
        ({"mutation": math.nan}, "mutation = nan"),
        ({"wide_mutation": -1.0}, "wide_mutation = -1.0"),
        ({"fitness": "simulated"}, "fitness = 'simulated' is unknown"),
        ({"population": 20_000}, "population = 20000: it is a whole number from 1 to 10,000"),
        ({"rate": 0.0}, "rate = 0.0"),
        ({"passes": 0}, "passes = 0"),
        ({"cycles": 1.5}, "cycles = 1.5"),
        ({"loss": "infonc"}, "did you mean 'infonce'|infonce"),
        ({"operands": ["wait"]}, "operands has no 'wait'"),
        ({"parameters": "scale"}, "it is a list of words"),
        ({"sites": []}, "it is a list of words"),
        ({"blocks": [True]}, "list of whole numbers"),
    ],
)
def test_settings_without_meaning_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        EvolveScalesSettings(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"blocks": [7]}, "the model has no block 7; its blocks are 0 to 1"),
        ({"sites": ["nothing.*"]}, "no quantized operand in a block is one of weight at sites that match nothing"),
    ],
)
def test_what_a_model_does_not_have_is_refused(options: dict[str, Any], said: str) -> None:
    model, images = made("timm deit")
    with pytest.raises(RecipeError, match=said):
        evolve_scales(model, context_of(model, [images]), EvolveScalesSettings(**options))


def test_a_batch_of_one_has_no_negatives() -> None:
    model, images = made("timm deit")
    with pytest.raises(CalibrationError, match="batch 3 has one image, and infonce compares"):
        evolve_scales(model, context_of(model, images.split(3)), EvolveScalesSettings(**QUICK))
    evolve_scales(model, context_of(model, images.split(3)), EvolveScalesSettings(**QUICK, loss="mse"))


def test_no_images_are_refused() -> None:
    model, _ = made("timm deit")
    with pytest.raises(CalibrationError, match="no calibration images"):
        evolve_scales(model, context_of(model, []), EvolveScalesSettings(**QUICK))


def test_a_mutation_as_large_as_a_scale_is_refused_by_the_name_of_the_weight() -> None:
    model, images = made("timm deit")
    with pytest.raises(CalibrationError, match="could make it zero or negative") as refused:
        evolve_scales(model, context_of(model, [images]), EvolveScalesSettings(mutation=1.0))
    assert refused.value.site in model.quantizers
    fresh, _ = made("timm deit")
    with torch.no_grad():
        next(q for name, q in fresh.quantizers.items() if "qkv:weight" in name).scale[0] = (
            2.0**-23
        )  # a channel of zeros
    evolve_scales(fresh, context_of(fresh, [images]), EvolveScalesSettings(mutation=1e-4, passes=1))


@pytest.mark.parametrize("parameter", ["zero_point", "factor"])
def test_weights_with_fixed_parameters_leave_nothing_to_evolve(parameter: str) -> None:
    build, size = ZOO["timm deit"]
    asked = [f"evolve-scales.parameters=['{parameter}']"]
    taken: list[int] = []

    def once() -> Iterator[Tensor]:
        for _ in range(2):
            taken.append(1)
            yield torch.zeros(2, 3, size, size)

    with pytest.raises(RecipeError, match=f"no quantizer of weight has a {parameter} that may change"):
        vitquant.quantize(build().eval(), "minmax+evolved-scales", once(), settings=asked)
    assert len(taken) == 1  # for its size


def test_outputs_that_are_no_numbers_are_refused() -> None:
    model, images = made("timm deit")
    with torch.no_grad():
        model.graph_module.get_parameter("head.bias").fill_(math.nan)
    with pytest.raises(CalibrationError, match="the loss is nan before the search"):
        evolve_scales(model, context_of(model, [images]), EvolveScalesSettings(**QUICK))

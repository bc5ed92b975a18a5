"""Programs that follow changes of a model, and searches whose fitness is that of the integers that are deployed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from architectures import ZOO, vary
from torch import Tensor

import vitquant
import vitquant.work
from vitquant.errors import LoweringError, RecipeError
from vitquant.lowering.following import FollowingProgram
from vitquant.lowering.lower import translate
from vitquant.lowering.recomputed_program import RecomputedProgram
from vitquant.model import QuantizedModel
from vitquant.model.saved import digest
from vitquant.objectives.output_loss import OUTPUT_LOSSES
from vitquant.program.instructions import IntegerProgram
from vitquant.recipe import load_recipe

QUICK = [
    "evolve-scales.passes=2", "evolve-scales.cycles=2", "evolve-scales.population=4", "evolve-scales.mutation=0.05",
    "evolve-scales.wide_mutation=0.05",
    "evolve-scales.relative=true", "evolve-scales.fitness=integers",
]  # fmt: skip


def network(name: str) -> tuple[torch.nn.Module, Tensor]:
    build, size = ZOO[name]
    torch.manual_seed(0)
    model = build().eval()
    vary(model)
    return model, torch.randn(7, 3, size, size, generator=torch.Generator().manual_seed(0))


def in_float(name: str, recipe: str, bits: str = "w4a8") -> tuple[QuantizedModel, Tensor]:
    """A model with the quantizers of a recipe and operations in float, whose recipe promises integers."""
    model, images = network(name)
    whole = load_recipe(recipe)
    kept = [each for each in whole.methods if each.name in ("calibrate", "choose-factors")]
    quantized = vitquant.quantize(model, replace(whole, methods=tuple(kept)), [images], bits=bits, simulated=True)
    quantized.recipe = replace(whole, methods=tuple(each for each in whole.methods if each.name != "evolve-scales"))
    return quantized, images


def assert_same(found: IntegerProgram, expected: IntegerProgram) -> None:
    assert found.instructions == expected.instructions
    assert found.registers == expected.registers
    assert (found.input, found.outputs, found.codes) == (expected.input, expected.outputs, expected.codes)
    assert found.facts == expected.facts
    assert found.constants.keys() == expected.constants.keys()
    for name, each in expected.constants.items():
        assert torch.equal(found.constants[name], each), name


def _scale(model: QuantizedModel, names: Sequence[str]) -> list[str]:
    for name in names:
        model.quantizers[name].scale = model.quantizers[name].scale * 1.07
    return list(names)


def _zero_point(model: QuantizedModel) -> list[str]:
    quantizer = model.quantizers["blocks.0.mlp.fc1:weight"]
    assert quantizer.zero_point is not None
    quantizer.zero_point = (quantizer.zero_point + 1).clamp(0, quantizer.spec.qmax)
    return ["blocks.0.mlp.fc1:weight"]


def _bias(model: QuantizedModel) -> list[str]:
    with torch.no_grad():
        model.graph_module.get_parameter("blocks.0.attn.proj.bias").add_(0.3)
        model.graph_module.get_parameter("blocks.1.attn.proj.weight").mul_(1.2)
    return ["blocks.0.attn.proj.bias", "blocks.1.attn.proj.weight"]


CHANGES: dict[str, Callable[[QuantizedModel], list[str]]] = {
    "weights": lambda model: _scale(model, ["blocks.0.attn.qkv:weight", "blocks.1.mlp.fc2:weight"]),
    "input": lambda model: _scale(model, ["blocks.1.mlp.fc1:input"]),
    "probabilities": lambda model: _scale(model, ["blocks.0.attn.context:probs"]),
    "scores": lambda model: _scale(model, ["blocks.0.attn.softmax:input"]),
    "activation": lambda model: _scale(model, ["blocks.1.mlp.act:input", "blocks.1.mlp.fc2:input"]),
    "stream": lambda model: _scale(model, [n for n in model.quantizers if "norm1:input" in n]),
    "image": lambda model: _scale(model, ["patch_embed:input"]),
    "output": lambda model: _scale(model, ["output:input"]),
    "zero point": _zero_point,
    "stored tensors": _bias,
    "nothing": lambda model: [],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_program_that_follows_is_the_one_that_is_lowered_anew(change: str) -> None:
    plain, _ = in_float("timm deit", "evol-q")
    model = copy.deepcopy(plain)
    model.compute_in_integers(vitquant.lowering.promise.promised(plain.recipe))  # type: ignore[arg-type]
    following = FollowingProgram(model)
    before = following.program
    kept = {name: each.clone() for name, each in before.constants.items()}
    assert_same(before, translate(model))
    changed = CHANGES[change](model)
    first = following.follow(changed)
    assert_same(following.program, translate(model))
    same = [a == b for a, b in zip(before.instructions, following.program.instructions, strict=True)]
    assert all(same[:first])
    assert all(torch.equal(before.constants[name], each) for name, each in kept.items())  # it stays as it was
    if change == "nothing":
        assert first == len(same)
    elif change == "weights":
        sites = [each.site for each in before.instructions[first:]]
        assert not any(site.startswith("patch_embed") for site in sites)


def test_a_model_without_integers_is_refused_and_followed_again_when_it_has_some() -> None:
    model, _ = in_float("timm deit", "evol-q")
    model.compute_in_integers(vitquant.lowering.promise.promised(model.recipe))  # type: ignore[arg-type]
    following = FollowingProgram(model)
    before = following.program
    quantizer, names = model.quantizers["blocks.0.mlp.fc1:weight"], ["blocks.0.mlp.fc1:weight"]
    scale = quantizer.scale
    for bad in (-scale, scale * 1e-30):
        quantizer.scale = bad
        for _ in range(2):
            with pytest.raises(LoweringError, match=r"fc1"):
                following.follow(names)
            assert following.program is before
    quantizer.scale = scale
    following.follow([])  # the whole model is lowered, whatever is said to have changed
    assert_same(following.program, translate(model))
    quantizer.scale = scale * 1.1
    following.follow(names)
    assert_same(following.program, translate(model))


def test_every_program_is_proved_not_to_overflow(monkeypatch) -> None:
    model, images = in_float("timm deit", "evol-q")
    recomputed = RecomputedProgram(model, [images], [7], {1: ["blocks.1.attn.qkv:weight"]}, 1e9)

    def refuse(program: IntegerProgram) -> None:
        raise LoweringError("a sum could overflow")

    monkeypatch.setattr("vitquant.lowering.recomputed_program.check_program", refuse)
    with pytest.raises(LoweringError, match="a sum could overflow"):
        recomputed.changed(1)


def test_a_child_that_cannot_be_deployed_is_not_chosen(monkeypatch) -> None:
    model, images = network("timm deit")
    changed, calls = RecomputedProgram.changed, 0

    def refusing(self: RecomputedProgram, block: int) -> None:
        nonlocal calls
        calls += 1
        changed(self, block)
        if calls in (1, 2):  # both children of the first block
            raise LoweringError("a sum could overflow")

    monkeypatch.setattr(RecomputedProgram, "changed", refusing)
    quantized = vitquant.quantize(model, "evol-q", images.split(4), settings=[*QUICK, "evolve-scales.passes=1"])
    record = next(record for record in quantized.records if record.method == "evolve-scales")
    gains = [each["loss lowered by"] for each in record.decisions.values()]
    assert gains[0] == 0.0
    assert record.summary["evaluations"] == 4


@pytest.mark.parametrize(
    ("name", "memory"),
    [("timm deit", 1e9), ("timm deit", 3e4), ("timm deit", 1.0), ("timm swin", 3e4), ("transformers vit", 1e9)],
)
def test_outputs_from_a_block_on_are_those_of_the_whole_program(name: str, memory: float) -> None:
    model, images = in_float(name, "evol-q")
    data, sizes = list(images.split(4)), [4, 3]
    weights = [n for n in model.quantizers if ":weight" in n]
    changing = {number: [n for n in weights if n.startswith(f"blocks.{number}.")] for number in model.index.blocks}
    recomputed = RecomputedProgram(model, data, sizes, changing, memory)
    whole = copy.deepcopy(model)
    with torch.inference_mode():
        for number in sorted(changing, reverse=True):
            for name in changing[number]:
                model.quantizers[name].scale = model.quantizers[name].scale * 0.93
                whole.quantizers[name].scale = whole.quantizers[name].scale * 0.93
            recomputed.changed(number)
            expected = _deployed(whole, data)
            for found, each in zip(recomputed.outputs(number), expected, strict=True):
                assert torch.equal(*found, each)  # type: ignore[call-arg]
            assert sum(map(recomputed.nbytes, chain(*recomputed.held._held.values()))) <= memory
        recomputed.renew()
        for found, each in zip(recomputed.outputs(max(changing)), expected, strict=True):
            assert torch.equal(*found, each)  # type: ignore[call-arg]


def _deployed(model: QuantizedModel, data: Sequence[Tensor]) -> list[Tensor]:
    integers = copy.deepcopy(model)
    integers.compute_in_integers(vitquant.lowering.promise.promised(model.recipe))  # type: ignore[arg-type]
    program = translate(integers)
    return [next(iter(integers.named_outputs(program.run(images)).values())) for images in data]


@pytest.mark.parametrize("loss", ["infonce", "mse"])
@pytest.mark.parametrize("recipe", ["evol-q", "repq-vit+evolved-scales+fully-integer"])
def test_the_loss_of_the_search_is_that_of_what_is_deployed(recipe: str, loss: str) -> None:
    model, images = network("timm deit")
    data = images.split(4)
    settings = [*QUICK, f"evolve-scales.loss={loss}"]
    quantized = vitquant.quantize(model, recipe, data, bits="w4a8s4" if "repq" in recipe else "w4a8", settings=settings)
    record = next(record for record in quantized.records if record.method == "evolve-scales")
    assert record.summary["loss after each pass"][-1] < record.summary["loss before"]
    program = vitquant.lower(quantized)
    with torch.no_grad():
        total = sum(OUTPUT_LOSSES[loss](program.run(batch), model(batch)).sum().item() for batch in data)
    assert record.summary["loss after each pass"][-1] == pytest.approx(total / len(images), rel=1e-5)


def test_it_does_not_depend_on_memory_or_interruptions(tmp_path, monkeypatch) -> None:
    model, images = network("timm deit")

    def search(**options: Any) -> str:
        return digest(vitquant.quantize(model, "evol-q", images.split(4), **{"settings": QUICK, **options}))

    whole = search()
    assert search(memory=3e-5) == whole
    monkeypatch.setattr(vitquant.work, "_EVERY", 0.0)
    monkeypatch.setattr(vitquant.work, "_SHARE", 1e9)

    def die(what: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(work=tmp_path / "work", progress=die)
    assert search(work=tmp_path / "work") == whole


def test_recipes_in_float_have_no_integers_to_be_fit() -> None:
    model, images = network("timm deit")
    with pytest.raises(RecipeError, match="leaves operations in float: lay \\+fully-integer over it"):
        vitquant.quantize(model, "minmax+evolved-scales", [images], settings=QUICK[-1:])
    with pytest.raises(RecipeError, match="fitness = 'integer' is unknown"):
        vitquant.quantize(model, "evol-q", [images], settings=["evolve-scales.fitness=integer"])
    quantized = vitquant.quantize(model, "minmax", [images])
    with pytest.raises(LoweringError, match="minmax leaves operations in float"):
        RecomputedProgram(quantized, [images], [7], {0: ()}, 1e9)

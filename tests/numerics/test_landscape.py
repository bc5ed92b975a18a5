"""Loss landscapes: every point against a model with these scales that is run as a whole, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ZOO, vary
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vitquant
from vitquant.errors import CalibrationError, CheckpointError, LoweringError, RecipeError
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.loss_landscape.evaluation import Evaluation
from vitquant.loss_landscape.jaggedness import jaggedness
from vitquant.loss_landscape.kept_numbers import KeptNumbers
from vitquant.loss_landscape.landscape import surveyed
from vitquant.loss_landscape.lines import Line, random_line, searched_line
from vitquant.loss_landscape.subject import Subject, evolution_settings, quantized, subject_of
from vitquant.lowering.promise import promised
from vitquant.lowering.recomputed_program import RecomputedProgram
from vitquant.methods.scale_evolution import evolve_scales, evolving_blocks
from vitquant.model import QuantizedModel
from vitquant.model.saved import digest
from vitquant.model.state import state_of
from vitquant.objectives.output_loss import OUTPUT_LOSSES
from vitquant.progress import silent
from vitquant.recipe import load_recipe, requested
from vitquant.recipe.rule import Rule
from vitquant.search.genes import Genes
from vitquant.work import WorkDirectory, WorkState

QUICK: dict[str, Any] = {"points": 3, "directions": 1, "cycles": 4}
RELATIVE = ["evolve-scales.mutation=0.05", "evolve-scales.wide_mutation=0.05", "evolve-scales.relative=true"]


def network(name: str) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """A model, calibration batches and batches held out."""
    build, size = ZOO[name]
    torch.manual_seed(0)
    model = build().eval()
    vary(model)
    images = torch.randn(12, 3, size, size, generator=torch.Generator().manual_seed(0))
    return model, list(images[:7].split(4)), list(images[7:].split(3))


def subject_for(name: str, recipe: str, bits: str, block: int, given: Sequence[str] = (), **others: Any) -> Subject:
    model, data, held_out = network(name)
    whole, widths = requested(recipe, bits, given)
    integers = promised(whole) is not None
    evolution = replace(evolution_settings(whole), **others)
    subject = subject_of(model, whole, widths, data, held_out, evolution, block, integers, 3, silent, 4.0)
    return quantized(subject, None)


def deployed(model: QuantizedModel) -> Any:
    """The integer program of a model whose operations are in float."""
    whole, arithmetic = copy.deepcopy(model), promised(model.recipe)
    assert arithmetic is not None
    whole.compute_in_integers(arithmetic)
    return vitquant.lower(whole).run


def naive(run: Any, floats: Any, data: Sequence[Tensor], loss: str) -> tuple[float, float]:
    """The mean loss, and the per cent of images with the same class, of a whole model."""
    with torch.inference_mode():
        pairs = [(run(images), floats(images)) for images in data]
    losses = torch.cat([OUTPUT_LOSSES[loss](*pair) for pair in pairs])
    same = torch.cat([a.argmax(1) == b.argmax(1) for a, b in pairs])
    return losses.sum().item() / len(losses), 100 * same.double().mean().item()


CASES = {
    "minmax": ("timm deit", "minmax", "w4a8", 0, [], "infonce"),
    "minmax mse": ("transformers vit", "minmax", "w4a8", 1, [], "mse"),
    "repq-vit": ("timm deit", "repq-vit+evolved-scales+fully-integer", "w4a8s4", 1, [], "infonce"),
    "evol-q": ("timm deit", "evol-q", "w4a8", 0, [*RELATIVE, "evolve-scales.keep_moments=false"], "kl"),
    "evol-q moments": ("timm deit", "evol-q", "w4a8", 1, RELATIVE, "infonce"),
    "evol-q integers": ("timm deit", "evol-q", "w4a8", 1, [*RELATIVE, "evolve-scales.fitness=integers"], "infonce"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_point_is_that_of_a_whole_model_with_these_scales(case: str) -> None:
    name, recipe, bits, number, given, loss = CASES[case]
    network_, data, held_out = network(name)
    shape = tuple(data[0].shape[1:])
    captured = CapturedModel(capture(network_, data[0][:2]), shape)  # type: ignore[arg-type]
    floats = lambda images: next(iter(captured.named_outputs(captured(images)).values()))  # noqa: E731
    found = vitquant.landscape(
        network(name)[0], recipe, data, held_out, bits=bits, block=number, settings=given, loss=loss, seed=3, points=3,
        directions=1, cycles=4,
    )  # fmt: skip
    assert [line.name for line in found.lines] == ["random 1", "searched"]
    assert found.forms == (("simulation",) if recipe == "minmax" else ("simulation", "integers"))

    # The same lines, from the definitions.
    subject = subject_for(name, recipe, bits, number, given, loss=loss)
    model, context = subject.model, subject.context
    ((_, block),) = evolving_blocks(model, context, subject.settings).items()
    start = torch.cat([each.scale.double().flatten() for each in block.quantizers.values()])
    assert found.scales == len(start)
    u = torch.rand(len(start), dtype=torch.float64, generator=context.generator("landscape 1")) * 2 - 1
    lines = [(u * start, [-0.05, 0.0, 0.05])]
    searched = copy.deepcopy(subject)
    by = replace(searched.context, integers=RecomputedProgram)
    evolve_scales(searched.model, by, replace(searched.settings, passes=1, cycles=4))
    if not block.layers:  # else scales are corrected after they are put
        best = torch.cat([searched.model.quantizers[each].scale.double().flatten() for each in block.quantizers])
        lines.append((best - start, [-1.0, 0.0, 0.5, 1.0, 2.0]))
    for line, (direction, positions) in zip(found.lines, lines, strict=False):
        assert line.positions == pytest.approx(positions, abs=1e-12)
        for place, position in enumerate(positions):
            with torch.no_grad():
                block.put(start + position * direction)
            check_point(found, line.name, place, model, floats, data, held_out, loss)
    end = found.lines[-1].positions.index(1.0)
    check_point(found, "searched", end, searched.model, floats, data, held_out, loss)
    assert found.found is not None
    assert found.found.after <= found.found.before
    curve = found.lines[-1].curves[found.found.by]
    assert (curve.loss[1], curve.loss[end]) == (found.found.before, found.found.after)


def check_point(
    found: vitquant.Landscape,
    name: str,
    place: int,
    model: QuantizedModel,
    floats: Any,
    data: list[Tensor],
    held_out: list[Tensor],
    loss: str,
) -> None:
    line = next(each for each in found.lines if each.name == name)
    outputs = {"simulation": lambda images: next(iter(model.named_outputs(model(images)).values()))}
    if "integers" in found.forms:
        outputs["integers"] = deployed(model)
    for form, curve in line.curves.items():
        expected, _ = naive(outputs[form], floats, data, loss)
        others, agreement = naive(outputs[form], floats, held_out, loss)
        assert curve.loss[place] == pytest.approx(expected, rel=1e-9), (name, place, form)
        assert curve.held_out_loss[place] == pytest.approx(others, rel=1e-9)
        assert curve.agreement is not None
        assert curve.agreement[place] == pytest.approx(agreement)


@pytest.mark.parametrize("recipe", ["minmax", "evol-q"])
def test_nothing_is_changed_whether_it_ends_or_is_interrupted(recipe: str) -> None:
    model, data, held_out = network("timm deit")
    before = {name: each.clone() for name, each in model.state_dict().items()}
    vitquant.landscape(model, recipe, data, held_out, bits="w4a8", **QUICK)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    subject = subject_for("timm deit", recipe, "w4a8", 1, RELATIVE if recipe == "evol-q" else ())
    whole, state = digest(subject.model), {name: each.clone() for name, each in state_of(subject.model).items()}

    def die(what: str, done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    arguments = (0.05, 3, 1, 4, recipe == "evol-q")
    with torch.no_grad():
        surveyed(subject, *arguments)
        assert digest(subject.model) == whole
        with pytest.raises(KeyboardInterrupt):
            surveyed(replace(subject, context=replace(subject.context, progress=die)), *arguments)
    assert digest(subject.model) == whole
    assert all(torch.equal(state[name], each) for name, each in state_of(subject.model).items())


def test_the_seed_decides_and_memory_does_not() -> None:
    model, data, held_out = network("timm deit")

    def numbers(**others: Any) -> str:
        return vitquant.landscape(model, "evol-q", data, held_out, settings=RELATIVE, **{**QUICK, **others}).to_json()

    whole = numbers()
    found = json.loads(whole)["found"]
    assert found["after"] < found["before"]
    assert numbers(memory=1e-9) == whole
    once, other = (numbers(seed=seed, simulated=True, cycles=0) for seed in (0, 1))
    assert json.loads(once)["lines"] != json.loads(other)["lines"]


@pytest.mark.parametrize(("fitness", "last"), [("simulation", 4), ("simulation", 13), ("integers", 4)])
def test_a_landscape_that_was_killed_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fitness: str, last: int
) -> None:
    model, data, held_out = network("timm deit")
    monkeypatch.setattr(vitquant.work, "_EVERY", -1.0)
    monkeypatch.setattr(vitquant.work, "_SHARE", 1e9)  # every evaluation is kept
    settings_ = [*RELATIVE, f"evolve-scales.fitness={fitness}"]
    measured: list[str] = []

    def counted(*_: object) -> None:
        measured.append("")
        if len(measured) == stop:
            shutil.copytree(work, killed)  # as a kill at this moment would leave it
            raise KeyboardInterrupt

    for name in ("loss", "measure"):
        real = getattr(Evaluation, name)
        monkeypatch.setattr(Evaluation, name, lambda form, genes, real=real: (counted(), real(form, genes))[1])

    def numbers(**others: Any) -> str:
        return vitquant.landscape(model, "evol-q", data, held_out, settings=settings_, **{**QUICK, **others}).to_json()

    stop, work, killed = 0, tmp_path, tmp_path
    whole = numbers()
    every = len(measured)
    assert every == 1 + 4 + 2 * (3 + 5)
    measured.clear()
    stop, work, killed = last, tmp_path / "interrupted", tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        numbers(work=work)
    stop = 0
    for directory in (work, killed):
        measured.clear()
        assert numbers(work=directory) == whole
        assert len(measured) == every - (last - 1)
    measured.clear()
    assert numbers(work=work) == whole
    assert not measured


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"held_out": 1}, "held_out"),
        ({"loss": "mse"}, "evolution"),
        ({"data": 1}, "calibration"),
        ({"points": 4}, "survey"),
        ({"reach": 0.06}, "reach"),
        ({"seed": 1}, "seed"),
        ({"block": 0}, "evolution"),
        ({"simulated": False}, "form"),
        ({"bits": "w3a8"}, "bits"),
        ({"recipe": "evol-q-tuned"}, "recipe"),
    ],
)
def test_the_work_of_another_landscape_is_refused(
    one_done: tuple[Path, dict[str, Any]], changed: dict[str, Any], key: str
) -> None:
    work, arguments = one_done
    for name in ("data", "held_out"):
        if name in changed:
            first, second, *rest = arguments[name]
            changed = {name: [first, second + 1, *rest]}  # behind the same first batch
    with pytest.raises(CheckpointError, match=f"of another run, with another {key}"):
        vitquant.landscape(network("timm deit")[0], **{**arguments, **changed}, work=work)


@pytest.fixture(scope="module")
def one_done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A work directory, and the arguments of its landscape."""
    model, data, held_out = network("timm deit")
    work = tmp_path_factory.mktemp("work")
    arguments: dict[str, Any] = {"recipe": "evol-q", "data": data, "held_out": held_out, "simulated": True}
    arguments |= {"points": 3, "directions": 1, "cycles": 0}
    vitquant.landscape(model, **arguments, work=work)
    assert (work / "landscape.safetensors").is_file()  # also of a run that takes less time than that between two saves
    return work, arguments


def test_numbers_are_kept_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    work = WorkState(WorkDirectory(tmp_path), "landscape")
    kept = KeptNumbers(work)
    assert kept.next(1, lambda: [math.inf]) == [None]
    assert kept.next(3, lambda: [0.1, math.nan, None]) == [0.1, None, None]
    kept.keep()
    again = KeptNumbers(work)
    known: Any = None  # is not called
    assert (again.next(1, known), again.next(3, known)) == ([None], [0.1, None, None])
    assert again.next(1, lambda: [2.0]) == [2.0]
    for damaged in ({}, {"numbers": 3}, {"numbers": [["x"]]}, {"numbers": [[1e200]]}, {"numbers": [[1, 2]]}):
        work.save({}, damaged)
        with pytest.raises(CheckpointError, match="is damaged: remove it"):
            KeptNumbers(work).next(1, known)


def test_a_model_without_a_finite_loss_is_refused_before_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, held_out = network("timm deit")
    asked: list[Tensor] = []
    monkeypatch.setattr(Evaluation, "loss", lambda _, genes: (asked.append(genes), math.nan)[1])
    with pytest.raises(CalibrationError, match="the simulation of the quantized model gives no finite loss"):
        vitquant.landscape(model, "evol-q", data, held_out, settings=RELATIVE, **QUICK)
    assert len(asked) == 1


def test_progress_counts_every_evaluation() -> None:
    model, data, held_out = network("timm deit")
    told: list[tuple[str, int, int]] = []
    vitquant.landscape(
        model, "evol-q", data, held_out, settings=RELATIVE, progress=lambda *step: told.append(step), **QUICK
    )
    counted = [(done, total) for what, done, total in told if "random" in what or "search" in what]
    assert counted == [(done, 4 + 2 * (3 + 5)) for done in range(4 + 2 * (3 + 5))]
    assert any(what.startswith("searching by the simulation: loss") for what, _, _ in told)


def test_without_a_search_or_without_integers() -> None:
    model, data, held_out = network("timm deit")
    found = vitquant.landscape(model, "evol-q", data, held_out, points=4, directions=1, cycles=0, simulated=True)
    assert [line.name for line in found.lines] == ["random 1"]
    assert found.lines[0].positions == pytest.approx((-0.05, -0.05 / 3, 0, 0.05 / 3, 0.05))
    assert (found.found, found.forms, found.simulated) == (None, ("simulation",), "as asked for")
    assert found.block == 1
    found = vitquant.landscape(model, "minmax", data, held_out, points=3, directions=0, cycles=1)
    assert [line.name for line in found.lines] == ["searched"]
    assert "minmax leaves operations in float" in found.simulated
    assert found.lines[0].difference is None


def test_blocks_whose_attention_is_in_float_have_their_other_weights_moved() -> None:
    model, data, held_out = network("timm deit")
    recipe = load_recipe("minmax")
    in_float = Rule("in-float", site=("blocks.*.attn.*",), operand=("weight",))
    recipe = replace(recipe, rules=(*recipe.rules, in_float))
    found = vitquant.landscape(model, recipe, data, held_out, **QUICK)
    assert found.operands == ("blocks.1.mlp.fc1:weight", "blocks.1.mlp.fc2:weight")
    evolving = replace(load_recipe("minmax+evolved-scales"), rules=recipe.rules)
    with pytest.raises(RecipeError, match=r"sites that match blocks\.\*\.attn"):
        vitquant.landscape(model, evolving, data, held_out)


def test_features_have_losses_and_no_agreement() -> None:
    model, data, held_out = network("untidy")
    found = vitquant.landscape(model, "minmax", data, held_out, loss="cosine", **QUICK)
    curve = found.lines[0].curves["simulation"]
    assert curve.agreement is None
    assert all(each is not None and each > 0 for each in curve.held_out_loss)


def test_points_that_cannot_be_deployed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, held_out = network("timm deit")
    changed, calls = RecomputedProgram.changed, 0

    def refusing(self: RecomputedProgram, block: int) -> None:
        nonlocal calls
        calls += 1
        changed(self, block)
        if calls == 1:
            raise LoweringError("a sum could overflow")

    monkeypatch.setattr(RecomputedProgram, "changed", refusing)
    found = vitquant.landscape(model, "evol-q", data, held_out, points=3, directions=1, cycles=0)
    simulation, integers = (found.lines[0].curves[form] for form in ("simulation", "integers"))
    assert None not in simulation.loss
    assert [each is None for each in integers.loss] == [True, False, False]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"block": 7}, RecipeError, "the model has no block 7; its blocks are 0 to 1"),
        ({"block": -1}, RecipeError, "no block -1"),
        ({"reach": 1.0}, RecipeError, "reach = 1.0: it is above 0 and below 1"),
        ({"reach": float("nan")}, RecipeError, "reach = nan"),
        ({"points": 2}, RecipeError, "points = 2: it is a whole number from 3"),
        ({"directions": -1}, RecipeError, "directions = -1"),
        ({"directions": 0, "cycles": 0}, RecipeError, "nothing to measure"),
        ({"loss": "infonc"}, RecipeError, "loss = 'infonc' is unknown; did you mean"),
        ({"memory": 0.0}, RecipeError, "memory = 0.0"),
        ({"data": 4}, CalibrationError, "calibration batch 2 has one image, and infonce"),
        ({"held_out": 1}, CalibrationError, "held-out batch 1 has one image, and infonce"),
        ({"held_out": iter}, CalibrationError, "can be read once only"),
        ({"held_out": []}, CalibrationError, "no calibration images"),
        ({"held_out": [torch.zeros(2, 3, 64, 64)]}, CalibrationError, "held-out images are 3x64x64, and the others"),
        ({"settings": ["evolve-scales.mutation=0.9"]}, CalibrationError, "could make it zero or negative"),
        ({"settings": ["evolve-scales.sites=['head']"]}, RecipeError, "sites that match head"),
        ({"bits": "w9a9"}, LoweringError, "promises integers"),
    ],
)
def test_what_cannot_be_measured_is_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    model, data, held_out = network("timm deit")
    if given.get("data") == 4:
        given = {**given, "data": list(torch.cat(data)[:5].split(4))}
    if given.get("held_out") == 1:
        given = {**given, "held_out": [held_out[0][:1]]}
    if given.get("held_out") is iter:
        given = {**given, "held_out": iter(held_out)}
    arguments: dict[str, Any] = {"data": data, "held_out": held_out, "bits": "w4a8", **QUICK, **given}
    with pytest.raises(error, match=message.replace("(", "\\(")):
        vitquant.landscape(model, "evol-q", **arguments)


# --- lines and jaggedness ---


def genes_of(start: Tensor) -> Genes:
    n = len(start)
    whole = torch.arange(n) % 3 == 2
    return Genes(
        torch.where(whole, start.mul(100).round().clamp(max=100), start),
        torch.where(torch.arange(n) == 0, 0.0, 0.1).double(),
        torch.ones(n).bool(),
        whole,
        torch.full((n,), 1e-8, dtype=torch.float64).where(~whole, torch.zeros(())),
        torch.full((n,), torch.inf, dtype=torch.float64).where(~whole, torch.tensor(100.0)),
        torch.zeros(n, dtype=torch.int64),
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(3, 60), st.floats(0.01, 0.99))
@example(189, 3, 0.5)  # an integer at its limit
def test_points_lie_on_their_line_and_within_the_limits(seed: int, count: int, reach: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    genes = genes_of(torch.rand(9, dtype=torch.float64, generator=generator) + 0.01)
    line = random_line("random 1", genes, reach, count, generator)
    _inside(genes, line)
    assert line.positions[0] == -reach
    assert line.positions[-1] == reach
    assert len(line.positions) == count + (count + 1) % 2
    t = torch.tensor(line.positions, dtype=torch.float64)
    moved = ((line.points - genes.start) / genes.start)[:, [1, 3, 4, 6, 7]]
    assert bool((moved.abs() <= t.abs().unsqueeze(1) + 1e-12).all())
    torch.testing.assert_close(moved, t.unsqueeze(1) / reach * moved[-1], rtol=1e-9, atol=1e-12)
    assert torch.equal(line.points[:, [0, 2, 5, 8]], genes.start[[0, 2, 5, 8]].expand(len(t), 4))  # these stay
    found = genes.start * (1 + 3 * torch.rand(9, dtype=torch.float64, generator=generator))
    found = torch.where(genes.whole, found.round().clamp(max=100), found)
    line = searched_line("searched", genes, found, count)
    _inside(genes, line)
    assert (line.positions[0], line.positions[-1]) == (-1, 2)
    assert torch.equal(line.points[line.positions.index(1.0)], found)
    assert list(line.positions) == sorted(set(line.positions))
    assert count <= len(line.positions) <= count + 2


def _inside(genes: Genes, line: Line) -> None:
    assert torch.equal(line.points[line.positions.index(0.0)], genes.start)
    assert bool(((line.points >= genes.low) & (line.points <= genes.high)).all())
    whole = line.points[:, genes.whole]
    assert torch.equal(whole, whole.round())


@pytest.mark.parametrize(
    ("values", "lowest", "minima", "variation"),
    [
        ([3, 2, 1], (1, 2), 0, 1),
        ([2, 1, 2], (1, 1), 1, 2),
        ([2, 1, 1, 2], (1, 1), 1, 2),
        ([1, 3, 1, 3, 2], (1, 0), 1, 3.5),
        ([1, 1], (1, 0), 0, 0),
        ([4, None, 2, 3], (2, 2), 1, 1.5),
    ],
)
def test_jaggedness(values: list[float | None], lowest: tuple[int, int], minima: int, variation: float) -> None:
    found = jaggedness(range(len(values)), values)
    assert found is not None
    assert (found.lowest, found.at, found.minima, found.variation) == (*lowest, minima, variation)
    assert jaggedness([0.0], [None]) is None

"""The contract of methods: their order, what is refused before images are looked at, and that nothing is lost."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from architectures import ZOO, vary

import vitquant
import vitquant.work
from vitquant.errors import CalibrationError, CheckpointError, RecipeError
from vitquant.methods.context import Context
from vitquant.methods.contract import Definition, Needs, Phase
from vitquant.methods.table import METHODS, planned
from vitquant.model import QuantizedModel, Record
from vitquant.model.saved import digest
from vitquant.recipe import Method, load_recipe

QUICK = ["search-scales.candidates=3", "search-scales.rounds=1", "search-scales.pairs=8"]


@pytest.fixture(scope="module")
def deit() -> tuple[torch.nn.Module, torch.Tensor]:
    build, size = ZOO["timm deit"]
    torch.manual_seed(0)
    model = build().eval()
    vary(model)
    return model, torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(0))


class Counted(list[torch.Tensor]):
    """Batches that count those that were taken."""

    taken = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in super().__iter__():
            self.taken += 1
            yield batch


def named(*names: str):
    recipe = load_recipe("minmax")
    return replace(recipe, methods=tuple(Method(name, {}) for name in names))


def test_phases_order_the_methods_whoever_names_them_where() -> None:
    names = ["integer-operations", "reconstruct-output", "choose-factors", "search-scales", "reparameterize-scales"]
    steps = planned(named(*names, "calibrate"))
    assert [step.name for step in steps] == ["calibrate", *reversed(names[2:]), *reversed(names[:2])]
    assert [step.definition.phase for step in steps] == sorted(step.definition.phase for step in steps)
    assert sum(step.definition.needs.passes for step in steps) == 1 + 1 + 2 + 1 + 2


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["calibrat"], "method 'calibrat' is unknown; did you mean calibrate?"),
        (["xyz"], "the methods are: calibrate, reparameterize-scales"),
        (["search-scales"], "search-scales works on what calibrate gives, which the recipe lacks"),
        (["integer-operations"], "integer-operations works on what calibrate gives"),
    ],
)
def test_what_cannot_be_ordered_is_refused(deit, names: list[str], said: str) -> None:
    model, images = deit
    data = Counted([images])
    with pytest.raises(RecipeError) as refused:
        vitquant.quantize(model, named(*names), data)
    assert said in str(refused.value)
    assert data.taken == 0


@pytest.mark.parametrize(("option", "value"), [("memory", 0.0), ("time_limit", -1.0), ("time_limit", math.nan)])
def test_budgets_without_meaning_are_refused(deit, option: str, value: float) -> None:
    model, images = deit
    with pytest.raises(RecipeError, match=f"{option} = "):
        vitquant.quantize(model, "minmax", [images], **{option: value})


def test_a_method_named_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match="calibrate"):
        named("calibrate", "calibrate")


def test_what_does_not_fit_is_refused_before_the_images_are_gone_through(deit) -> None:
    model, images = deit
    data = Counted(images.split(2))
    with pytest.raises(RecipeError, match="reparameterize-scales: no LayerNorm is called nothing"):
        vitquant.quantize(model, "repq-vit", data, settings=['reparameterize-scales.sites=["nothing"]'])
    assert data.taken == 1  # for its size
    taken = []

    def once() -> Iterator[torch.Tensor]:
        for batch in images.split(2):
            taken.append(batch)
            yield batch

    with pytest.raises(CalibrationError, match="more than once"):
        vitquant.quantize(model, "repq-vit", once())
    assert len(taken) == 1
    assert vitquant.quantize(model, "minmax", once()).provenance["calibration"]["images"] == 6


@dataclass(frozen=True)
class SpySettings:
    """None."""


class Spy:
    """A method that keeps what it was given."""

    def __init__(self, phase: Phase, needs: Needs) -> None:
        self.definition = Definition(self.run, SpySettings, phase, needs, ("calibrate",))

    def run(self, model: QuantizedModel, context: Context, settings: SpySettings) -> Record:
        self.model, self.context = model, context
        self.labels = [each for _, each in context.labelled] if self.definition.needs.labels else []
        return Record("spy")


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch):
    def spy(phase: Phase, needs: Needs) -> Spy:
        found = Spy(phase, needs)
        monkeypatch.setitem(METHODS, "spy", found.definition)
        return found

    return spy


def with_spy(recipe: str):
    found = load_recipe(recipe)
    return replace(found, methods=(*found.methods, Method("spy", {})))


def test_labels_are_given_to_methods_that_need_them(deit, spied) -> None:
    model, images = deit
    spy = spied(Phase.TRAIN, Needs(labels=True))
    for unlabelled in ([images], [(images, None)], [(images, torch.zeros(5))], [{"pixel_values": images}]):
        with pytest.raises(CalibrationError, match="labels are needed"):
            vitquant.quantize(model, with_spy("minmax"), unlabelled)
    labels = torch.arange(6)
    for labelled in ([(images, labels)], [{"pixel_values": images, "labels": labels}]):
        vitquant.quantize(model, with_spy("minmax"), labelled)
        assert torch.equal(torch.cat(spy.labels), labels)


def test_the_teacher_is_the_float_model_whatever_methods_make_of_weights(deit, spied) -> None:
    model, images = deit
    spy = spied(Phase.RECONSTRUCT, Needs(teacher=True))
    vitquant.quantize(model, with_spy("vt-ptq"), [images], settings=QUICK)
    with torch.no_grad():
        assert not torch.equal(spy.model.run(images, {}, quantized=False), model(images))  # biases are corrected
        torch.testing.assert_close(spy.context.teacher(images), model(images), rtol=0, atol=1e-5)
        of_teacher = dict(spy.context.teacher.graph_module.named_parameters())
        assert all(torch.equal(of_teacher[name], each) for name, each in model.named_parameters())


def test_what_is_folded_is_folded_in_the_teacher_too(deit, spied) -> None:
    model, images = deit
    spy = spied(Phase.RECONSTRUCT, Needs(teacher=True))
    vitquant.quantize(model, with_spy("repq-vit"), [images], bits="w4a4")
    names = [site.name for site in spy.model.sites if site.kind == "layer_norm"]
    with torch.no_grad():
        student = spy.model.segment("images", names, quantized=False)(images)
        teacher = spy.context.teacher.segment("images", names)(images)
        assert all(torch.equal(*pair) for pair in zip(student, teacher, strict=True))
        torch.testing.assert_close(spy.context.teacher(images), model(images), rtol=0, atol=1e-4)
    changed = [name for name, each in model.named_parameters() if not torch.equal(each, dict(
        spy.context.teacher.graph_module.named_parameters())[name])]  # fmt: skip
    assert changed


def test_random_numbers_are_of_a_seed_and_a_purpose() -> None:
    def drawn(seed: int, name: str) -> list[float]:
        return torch.rand(4, generator=Context([], seed=seed).generator(name)).tolist()

    assert drawn(1, "a") == drawn(1, "a")
    assert len({tuple(drawn(seed, name)) for seed in (1, 2) for name in ("a", "b")}) == 4


# --- nothing is lost ---

LONG = "repq-vit+searched-scales+reconstructed-output+fully-integer"
STEPS = [*QUICK, "reconstruct-output.steps=4", "reconstruct-output.batch=3"]


class KilledError(Exception):
    """Not one of ours: nothing handles it."""


@pytest.fixture(scope="module")
def whole(deit) -> str:
    model, images = deit
    return digest(vitquant.quantize(model, LONG, images.split(3), bits="w4a4", settings=STEPS))


@pytest.mark.parametrize("moment", [0, 1, 5, 9, 12, 13, 15, 16])
def test_a_killed_run_goes_on_and_ends_the_same(deit, whole, tmp_path, monkeypatch, moment: int) -> None:
    model, images = deit
    monkeypatch.setattr(vitquant.work, "_EVERY", 0.0)
    monkeypatch.setattr(vitquant.work, "_SHARE", 1e9)  # at every chance
    said: list[tuple[str, int]] = []

    def until(last: int):
        def progress(what: str, done: int, total: int) -> None:
            said.append((what, done))
            if len(said) > last:
                raise KilledError

        return progress

    options = {"bits": "w4a4", "settings": STEPS, "work": tmp_path / "work"}
    with pytest.raises(KilledError):
        vitquant.quantize(model, LONG, images.split(3), progress=until(moment), **options)
    before, said = said, []
    found = vitquant.quantize(model, LONG, images.split(3), progress=until(10_000), **options)
    assert digest(found) == whole
    assert said[0] == before[-1]  # not from the beginning
    assert found.provenance["calibration"]["images"] == 6
    assert [record.method for record in found.records] == [
        "calibrate", "reparameterize-scales", "search-scales", "choose-factors", "reconstruct-output",
        "integer-operations",
    ]  # fmt: skip
    again = vitquant.quantize(model, LONG, Counted(images.split(3)), **options)
    assert digest(again) == whole


def test_states_of_another_run_or_damaged_ones_are_refused(deit, tmp_path) -> None:
    model, images = deit
    work = tmp_path / "work"
    vitquant.quantize(model, "repq-vit", images.split(3), work=work)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    for changed, said in (
        ({"recipe": "minmax"}, "another recipe"),
        ({"bits": "w6a6"}, "another bits"),
        ({"seed": 1}, "another seed"),
        ({"data": images.split(2)}, "another images"),
        ({"model": other}, "another model"),
    ):
        asked = {"model": model, "recipe": "repq-vit", "data": images.split(3), **changed}
        with pytest.raises(CheckpointError, match=said):
            vitquant.quantize(asked.pop("model"), asked.pop("recipe"), asked.pop("data"), work=work, **asked)
    file = work / "2-reparameterize-scales.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-5])
    with pytest.raises(CheckpointError, match="is damaged: remove it"):
        vitquant.quantize(model, "repq-vit", images.split(3), work=work)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model/other"] = header.pop("model/head.weight")
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(CheckpointError, match=r"head\.weight is missing|not part of the model"):
        vitquant.quantize(model, "repq-vit", images.split(3), work=work)


def test_past_the_time_limit_methods_end_with_what_they_have_and_go_on_later(deit, whole, tmp_path) -> None:
    model, images = deit
    options = {"bits": "w4a4", "settings": STEPS, "work": tmp_path / "work"}
    found = vitquant.quantize(model, LONG, images.split(3), time_limit=0.0, **options)
    records = {record.method: record for record in found.records}
    assert {each["as calibrated, because"] for each in records["search-scales"].decisions.values()} == {
        "the time is up"
    }
    assert records["reconstruct-output"].summary["steps"] == 0
    vitquant.lower(found)  # whole all the same
    assert digest(found) != whole
    assert digest(vitquant.quantize(model, LONG, images.split(3), **options)) == whole

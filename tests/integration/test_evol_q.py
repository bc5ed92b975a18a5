"""The recipe evol-q and the overlay evolved-scales, from models to integers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from architectures import ZOO, vary
from PIL import Image
from safetensors.torch import load_file, save_file

import vitquant
import vitquant.work
from vitquant.errors import CalibrationError, CheckpointError
from vitquant.model.saved import digest
from vitquant.objectives.output_loss import infonce
from vitquant.recipe import Method, load_recipe

QUICK = [
    "evolve-scales.passes=2", "evolve-scales.cycles=2", "evolve-scales.population=4", "evolve-scales.mutation=0.05",
    "evolve-scales.wide_mutation=0.05",
    "evolve-scales.relative=true",
]  # fmt: skip


def network(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    build, size = ZOO[name]
    torch.manual_seed(0)
    model = build().eval()
    vary(model)
    return model, torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def deit() -> tuple[torch.nn.Module, torch.Tensor]:
    return network("timm deit")


@pytest.mark.parametrize(
    ("recipe", "bits"), [("evol-q", "w3a8"), ("evol-q", "w4a8"), ("evol-q", "w8a8"), ("evol-q-tuned", "w3a8")]
)
def test_the_recipe_runs_in_integers_with_every_weight_on_its_grid(deit, recipe: str, bits: str) -> None:
    model, images = deit
    quantized = vitquant.quantize(model, recipe, [images], bits=bits, settings=QUICK)
    assert [record.method for record in quantized.records] == [
        "calibrate", "choose-factors", "correct-weights", "evolve-scales", "integer-operations",
    ]  # fmt: skip
    summary = quantized.records[3].summary
    assert summary["loss after each pass"][-1] < summary["loss before"]
    for value in quantized.values:
        if value.parameter is not None and any(reader.operand == "weight" for reader in value.readers):
            spec = quantized.assignments[value.name].spec
            assert spec is not None
            assert not spec.signed
            assert not spec.symmetric
            assert spec.bits == int(bits[1])
    program = vitquant.lower(quantized)
    report = vitquant.compare(quantized, [images], float_model=model)
    assert not report.broken
    assert program.instructions


def test_the_tuned_recipe_quantizes_the_same_operands_by_the_same_specs() -> None:
    published, tuned = load_recipe("evol-q"), load_recipe("evol-q-tuned")
    differing = [(a, b) for a, b in zip(published.rules, tuned.rules, strict=True) if a != b]
    assert [(a, b) for a, b in differing if replace(a, observer=b.observer) != b] == []
    assert [(b.name, b.observer) for _, b in differing] == [("weights", "omse")]
    assert [each.name for each in published.methods] == [each.name for each in tuned.methods]


ON_TOP = ("evol-q", "evol-q-tuned", *(f"{base}+evolved-scales" for base in ("repq-vit", "vt-ptq", "minmax", "fq-vit")))


@pytest.mark.parametrize(
    ("name", "recipe"),
    [*(("timm deit", recipe) for recipe in ON_TOP), *((name, "evol-q") for name in ("timm swin", "torchvision vit"))],
)
def test_it_works_on_top_of_other_recipes_and_models(name: str, recipe: str) -> None:
    model, images = network(name)
    settings = [*QUICK, "search-scales.candidates=3", "search-scales.rounds=1"] if "vt-ptq" in recipe else QUICK
    quantized = vitquant.quantize(model, recipe, [images], bits="w4a8", settings=settings, simulated=True)
    record = next(record for record in quantized.records if record.method == "evolve-scales")
    assert record.summary["loss after each pass"][-1] <= record.summary["loss before"]
    assert record.summary["evaluations"] == record.summary["of"]
    assert len(record.decisions) == len(quantized.index.blocks)


def test_mixed_precision_evolves_too(deit) -> None:
    model, images = deit
    table = vitquant.sensitivity(model, "vt-ptq", [images], bits="w6a6", candidates=[4, 6, 8])
    recipe, _ = table.allocate(mean_bits=5.5)
    settings = {"passes": 1, "relative": True, "mutation": 0.05, "wide_mutation": 0.05}
    kept = (*(method for method in recipe.methods if method.name != "search-scales"), Method("evolve-scales", settings))
    quantized = vitquant.quantize(model, replace(recipe, methods=kept), [images], bits=table.bits, simulated=True)
    widths = {
        q.spec.bits for name, q in quantized.quantizers.items() if name.startswith("blocks.") and ":weight" in name
    }
    assert len(widths) > 1
    assert quantized.records[-1].summary["loss after"] < quantized.records[-1].summary["loss before"]


def test_features_evolve_by_the_same_losses(deit) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), img_size=32, depth=2,
                              embed_dim=32, num_heads=2).eval()  # fmt: skip
    _, images = deit
    quantized = vitquant.quantize(model, "evol-q", [images], settings=QUICK, simulated=True)
    record = next(record for record in quantized.records if record.method == "evolve-scales")
    assert record.summary["loss after each pass"][-1] < record.summary["loss before"]


def test_the_same_seed_gives_the_same_model_and_another_another(deit) -> None:
    model, images = deit
    of = [
        digest(vitquant.quantize(model, "evol-q", images.split(3), settings=QUICK, seed=seed, memory=memory))
        for seed, memory in ((0, 4.0), (0, 1e-6), (1, 4.0))
    ]
    assert of[0] == of[1] != of[2]


def test_models_that_give_what_is_between_blocks_evolve_too() -> None:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=5, output_hidden_states=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config).eval()
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for recipe in ("evol-q", "repq-vit+evolved-scales"):
        records = [
            next(record for record in quantized.records if record.method == "evolve-scales")
            for quantized in (
                vitquant.quantize(model, recipe, [images], settings=QUICK, simulated=True, memory=memory)
                for memory in (4.0, 1e-6)
            )
        ]
        assert records[0] == records[1]
        assert records[0].summary["loss after"] < records[0].summary["loss before"]


class TokensFirst(torch.nn.Module):
    """Gives (tokens, images, classes)."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.forward_features(images).transpose(0, 1)


def test_losses_compare_images_whatever_axis_they_are(deit) -> None:
    model, images = deit
    settings = [*QUICK, "evolve-scales.passes=1"]
    first, last = (
        vitquant.quantize(each, "minmax+evolved-scales", [images], settings=settings, simulated=True)
        for each in (TokensFirst(model), torch.nn.Sequential(TokensFirst(model), Transposed()))
    )
    losses = [each.records[1].summary["loss before"] for each in (first, last)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


class Transposed(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1)


class Shuffled(list[torch.Tensor]):
    """Batches in another order each time."""

    turn = 0

    def __iter__(self):
        self.turn += 1
        return self._turned()

    def _turned(self):
        batches = [self[place] for place in range(len(self))]
        yield from batches[self.turn % 2 :] + batches[: self.turn % 2]


class Shrinking(Shuffled):
    """Fewer batches each time."""

    def _turned(self):
        yield from [self[place] for place in range(len(self))][: max(1, 4 - self.turn)]


@pytest.mark.parametrize("kind", [Shuffled, Shrinking])
def test_batches_in_another_order_are_refused(deit, kind: type[Shuffled]) -> None:
    model, images = deit
    with pytest.raises(CalibrationError, match=r"evolve-scales: the batches are others .* shuffle = False"):
        vitquant.quantize(model, "minmax+evolved-scales", kind(images.split(2)), settings=QUICK, simulated=True)


def test_it_works_where_gradients_cannot_be(deit) -> None:
    model, images = deit
    with torch.inference_mode():
        quantized = vitquant.quantize(model, "evol-q", [images], settings=QUICK)
    assert digest(quantized) == digest(vitquant.quantize(model, "evol-q", [images], settings=QUICK))


# --- nothing is lost ---


class KilledError(Exception):
    """Not one of ours: nothing handles it."""


@pytest.fixture(scope="module")
def whole(deit) -> tuple[str, int]:
    """The digest of an undisturbed run, and how often it tells its progress."""
    model, images = deit
    told: list[str] = []
    quantized = vitquant.quantize(
        model, "evol-q", images.split(3), settings=QUICK, progress=lambda what, *_: told.append(what)
    )
    return digest(quantized), len(told)


@pytest.mark.parametrize("seed", range(20))
def test_a_search_that_was_killed_goes_on_and_ends_the_same(deit, whole, tmp_path, monkeypatch, seed: int) -> None:
    model, images = deit
    monkeypatch.setattr(vitquant.work, "_EVERY", 0.0)
    monkeypatch.setattr(vitquant.work, "_SHARE", 1e9)  # at every chance
    expected, told = whole
    last = random.Random(seed).randrange(told)
    said: list[tuple[str, int]] = []

    def until(last: int):
        def progress(what: str, done: int, total: int) -> None:
            said.append((what.partition(",")[0], done))
            if len(said) > last:
                raise KilledError

        return progress

    options = {"settings": QUICK, "work": tmp_path / "work"}
    with pytest.raises(KilledError):
        vitquant.quantize(model, "evol-q", images.split(3), progress=until(last), **options)
    before, said = said, []
    found = vitquant.quantize(model, "evol-q", images.split(3), progress=until(10_000), **options)
    assert digest(found) == expected
    assert said[0][1] >= before[-1][1] - 1  # not from the beginning


def test_past_the_time_limit_it_ends_with_the_best_so_far_and_goes_on_later(deit, whole, tmp_path) -> None:
    model, images = deit
    options = {"settings": QUICK, "work": tmp_path / "work"}
    found = vitquant.quantize(model, "evol-q", images.split(3), time_limit=0.0, **options)
    record = next(record for record in found.records if record.method == "evolve-scales")
    assert record.summary["evaluations"] == 0
    assert record.summary["of"] == 8
    vitquant.lower(found)  # whole all the same
    assert digest(found) != whole[0]
    assert digest(vitquant.quantize(model, "evol-q", images.split(3), **options)) == whole[0]


@pytest.fixture
def stopped(deit, tmp_path, monkeypatch) -> Callable[[], vitquant.QuantizedModel]:
    """Continues a search that was killed after three evaluations, with its state in tmp_path."""
    model, images = deit
    monkeypatch.setattr(vitquant.work, "_EVERY", 0.0)
    monkeypatch.setattr(vitquant.work, "_SHARE", 1e9)

    def die(what: str, done: int, total: int) -> None:
        if done == 3:
            raise KilledError

    options = {"settings": QUICK, "work": tmp_path / "work"}
    with pytest.raises(KilledError):
        vitquant.quantize(model, "evol-q", images.split(3), progress=die, **options)
    return lambda: vitquant.quantize(model, "evol-q", images.split(3), **options)


def test_at_the_deadline_the_model_is_the_best_so_far_and_the_record_says_so(deit, tmp_path, monkeypatch) -> None:
    model, images = deit
    monkeypatch.setattr(vitquant.work, "_EVERY", 0.0)
    monkeypatch.setattr(vitquant.work, "_SHARE", 1e9)
    settings = [*QUICK, "evolve-scales.cycles=9"]

    def die(what: str, done: int, total: int) -> None:
        if done == 7:  # in the middle of a block
            raise KilledError

    def search(**options: Any) -> vitquant.QuantizedModel:
        data = images.split(3)
        return vitquant.quantize(
            model, "minmax+evolved-scales", data, bits="w4a8", settings=settings, work=tmp_path / "work", **options
        )

    with pytest.raises(KilledError):
        search(progress=die)
    found = search(time_limit=0.0)
    summary = found.records[1].summary
    assert summary["evaluations"] == 7
    assert summary["loss after"] < summary["loss before"]
    with torch.no_grad():
        loss = sum(infonce(found(batch), model(batch)).sum().item() for batch in images.split(3)) / 6
    assert loss == pytest.approx(summary["loss after"], rel=1e-6)


def test_a_state_of_other_images_is_refused(deit, stopped, tmp_path) -> None:
    model, images = deit
    others = [images[:3], images[3:] + 1]
    with pytest.raises(CheckpointError, match="is of other calibration images"):
        vitquant.quantize(model, "evol-q", others, settings=QUICK, work=tmp_path / "work")


@pytest.mark.parametrize("key", ["genes/1", "search/members", "search/generator", "search/age"])
def test_damaged_states_are_refused(stopped, tmp_path, key: str) -> None:
    file, tensors, about = _part(tmp_path)
    without = {name: each for name, each in tensors.items() if name != key}
    wrong = [torch.zeros(3), *_wrong(tensors[key])]
    for changed in (without, *(without | {key: each} for each in wrong)):
        save_file(changed, file, about)
        with pytest.raises(CheckpointError, match="is damaged: remove it"):
            stopped()


def test_states_with_other_counts_are_refused(stopped, tmp_path) -> None:
    file, tensors, about = _part(tmp_path)
    for name, values in (("evaluations", 99), ("losses", []), ("gains", [0.0]), ("losses", [1.0, "x"])):
        save_file(tensors, file, {"values": json.dumps(json.loads(about["values"]) | {name: values})})
        with pytest.raises(CheckpointError, match="is damaged: remove it"):
            stopped()


def _part(folder: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, str]]:
    """The state of a method that has not ended: its file, its tensors and its values."""
    (file,) = (folder / "work").glob("*.part.safetensors")
    content = file.read_bytes()
    about = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    return file, load_file(file), about


def _wrong(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of the same shape and dtype that no search gives."""
    if tensor.dtype == torch.int64:  # ages
        return [torch.full_like(tensor, -1), torch.full_like(tensor, 7), torch.arange(-1, len(tensor) - 1)]
    return [torch.zeros_like(tensor) if tensor.dtype == torch.uint8 else torch.full_like(tensor, -1)]


def test_bad_input_is_a_line(deit, run, tmp_path) -> None:
    for number in range(3):
        Image.new("RGB", (32, 32), (number * 40, 9, 9)).save(tmp_path / f"{number}.png")
    arguments = ["--model-arg", "img_size=32", "--model-arg", "depth=2", "--weights", "random"]
    for settings, said in (
        (["--batch", "1"], "infonce compares every image with the others of its batch"),
        (["--set", "evolve-scales.blocks=[5]"], "evolve-scales: the model has no block 5; its blocks are 0 to 1"),
        (["--set", "evolve-scales.mutation=3"], "could make it zero or negative"),
        (["--set", "evolve-scales.mutations=3"], "mutations"),
        (["--set", "evolve-scales.passes=x"], "passes"),
    ):
        words = ["quantize", "timm:deit_tiny_patch16_224", "--calibration", tmp_path, "--output", tmp_path / "out"]
        code, out, err = run(*words, *arguments, "--recipe", "evol-q", *settings)
        assert code == 2
        assert said in err
        assert out == ""
        assert not (tmp_path / "out").exists()

"""From a float model to a recipe with bits for each module, on tiny models of every library with random weights."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from architectures import ZOO, vary

import vitquant
from vitquant.allocation.front import Costs, pareto_front
from vitquant.allocation.table import MEASURES, SensitivityTable
from vitquant.errors import AllocationError, CalibrationError, CheckpointError, RecipeError
from vitquant.model.saved import stored_bytes
from vitquant.model.simulation import ExactSimulation
from vitquant.recipe import Recipe, assign, load_recipe
from vitquant.runtime.on_images import interpreted

QUICK = ("search-scales.candidates=6", "search-scales.pairs=8")
SLOW = ("timm swinv2", "timm levit", "timm pvt_v2", "timm mvitv2", "torchvision swin")
LIBRARIES = (
    *("timm deit", "timm swin", "transformers vit", "encoder post-norm relu", "einsum"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
)


def made(name, count=5):
    build, size = ZOO[name]
    torch.manual_seed(0)
    model = build().eval()
    vary(model)
    return model, torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def measured(name, recipe="vt-ptq", **arguments):
    model, images = made(name)
    settings = QUICK if recipe.startswith("vt-ptq") else ()
    return vitquant.sensitivity(model, recipe, images.split(2), settings=settings, **arguments), model, images


@pytest.fixture(scope="module")
def deit():
    return measured("timm deit", bits="w6a6")


@pytest.mark.parametrize("name", LIBRARIES)
def test_modules_of_every_library_get_the_bits_that_were_allocated(name):
    table, model, images = measured(name, bits="w6a6", candidates=(5, 7))
    parts = {module.rpartition(".")[2] for module in table.numbers}
    assert parts == {"attn"} if name == "einsum" else {"attn", "mlp"}
    recipe, chosen = table.allocate(mean_bits=6)
    assert set(chosen.bits) == set(table.numbers)
    calibrated = replace(recipe, methods=recipe.methods[:1])
    quantized = vitquant.quantize(model, calibrated, images.split(2))
    decided = {
        value: chosen.bits[module]
        for module, rules in table.values.items()
        for names in rules.values()
        for value in names
    }
    for value, assignment in quantized.assignments.items():
        if assignment.spec is not None:
            expected = 8 if value == "patch_embed:input" else decided.get(value, 6)
            assert assignment.spec.bits == expected, value
    # what is said of the size is so
    numbers = {value.name: value for value in quantized.values if value.parameter is not None}
    bits = sum(
        quantized.assignments[name].spec.bits * math.prod(value.shape)
        for name, value in numbers.items()
        if name in decided and value.readers[0].operand == "weight"
    )
    assert bits / sum(table.numbers.values()) == pytest.approx(table.mean_bits().total(chosen.cost))
    size = sum(stored_bytes(quantized).values())
    assert size == pytest.approx(1e6 * table.megabytes().total(sum(table.bytes[m][b] for m, b in chosen.bits.items())))


def _logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def test_every_part_loses_something_and_less_with_more_bits(deit):
    table = deit[0]
    assert {each.name for each in table.sites} >= {"patch_embed", "blocks.0.attn.context", "blocks.1.mlp.fc2", "head"}
    for each in (*table.modules, *table.sites):
        assert each.output_error > 0
        assert each.squared_error > 0
        assert each.correlation < 1
    by_bits = {
        bits: sum(each.output_error for each in table.modules if each.bits == str(bits)) for bits in table.candidates
    }
    assert sorted(by_bits, key=by_bits.__getitem__) == [8, 7, 6, 5, 4]


def test_some_quantizers_are_some_of_all(deit):
    _, model, images = deit
    quantized = vitquant.quantize(model, "minmax", images.split(2))
    names = [value.name for value in quantized.values if value.readers[0].site.startswith("blocks.0.mlp")]
    with torch.no_grad():
        everything, nothing = quantized.run(images, {}), quantized.run(images, {}, quantized=False)
        alone = quantized.run(images, {}, quantized=names)
        assert torch.equal(quantized.run(images, {}, quantized=[]), nothing)
        assert torch.equal(quantized.run(images, {}, quantized=quantized.quantized_names), everything)
    assert not torch.equal(alone, nothing)
    assert not torch.equal(alone, everything)


@pytest.mark.parametrize("name", ["timm deit", "timm swin", "torchvision swin"])
def test_what_stands_before_a_part_need_not_be_computed_again(name):
    model, images = made(name)
    quantized = vitquant.quantize(model, "fq-vit", images.split(2))
    with torch.no_grad():
        for value in quantized.quantized_names:
            behind = quantized.downstream_segment([value], "output")
            known = quantized.segment("images", behind.inputs, quantized=False)(images)
            expected = _logits(quantized.run(images, {}, quantized=[value]))
            assert torch.equal(behind(*known), expected), value


class KilledError(Exception):
    """Not one of ours: nothing handles it."""


@pytest.mark.parametrize("moment", [3, 110])
def test_a_killed_measurement_goes_on_and_ends_the_same(deit, tmp_path, moment):
    _, model, images = deit
    said = []

    def until(last):
        def progress(what, done, total):
            said.append(what)
            if len(said) > last:
                raise KilledError

        return progress

    asked = {"bits": "w6a6", "candidates": (4, 8), "work": tmp_path / "work"}
    with pytest.raises(KilledError):
        vitquant.sensitivity(model, "minmax", images.split(2), progress=until(moment), **asked)
    said.clear()
    table = vitquant.sensitivity(model, "minmax", images.split(2), progress=until(10_000), **asked)
    again = len(said)
    said.clear()
    whole = vitquant.sensitivity(
        model, "minmax", images.split(2), bits="w6a6", candidates=(4, 8), progress=until(10_000)
    )
    assert table == whole
    assert again < len(said) or moment < 10  # what was measured is not measured again
    with pytest.raises(CheckpointError, match="another candidates"):
        vitquant.sensitivity(model, "minmax", images.split(2), **{**asked, "candidates": (4, 6)})


@pytest.mark.parametrize("by", MEASURES)
def test_mixed_is_never_more_sensitive_than_the_same_bits_everywhere(deit, by):
    table = deit[0]
    for costs in (table.mean_bits(), table.megabytes()):
        for cost, lost in table.uniform(by, costs).values():
            _, chosen = table.allocate(within=(costs.total(cost), costs), by=by)
            assert chosen.sensitivity <= lost
            assert chosen.cost <= cost


def test_megabytes_are_those_of_the_saved_model(deit, tmp_path):
    table, model, images = deit
    costs = table.megabytes()
    for megabytes in (costs.total(cost) for cost, _ in table.uniform("nuclear-norm", costs).values()):
        recipe, chosen = table.allocate(megabytes=megabytes)
        quantized = vitquant.quantize(model, recipe, images.split(2))
        assert sum(stored_bytes(quantized).values()) == pytest.approx(costs.total(chosen.cost) * 1e6)
    quantized.save(tmp_path / "saved")
    restored = vitquant.load(tmp_path / "saved", model=model)
    with torch.no_grad():
        assert torch.equal(restored(images), quantized(images))


def test_the_same_bits_everywhere_are_the_recipe_itself(deit):
    table, model, images = deit
    recipe = table.with_bits(dict.fromkeys(table.numbers, 6), "hand")
    mixed = vitquant.quantize(model, recipe, images.split(2))
    plain = vitquant.quantize(model, "vt-ptq", images.split(2), bits="w6a6", settings=QUICK)
    with torch.no_grad():
        assert torch.equal(mixed(images), plain(images))


def test_a_recipe_of_mixed_precision_is_a_file_like_any_other(deit, tmp_path):
    recipe, _ = deit[0].allocate(mean_bits=5.5)
    path = tmp_path / "mixed.toml"
    path.write_text(recipe.to_toml())
    assert load_recipe(str(path)) == recipe == Recipe.from_dict(recipe.to_dict())
    assert "5.5" in recipe.title or "5.4" in recipe.title


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("vt-ptq+fully-integer", "timm deit"), ("repq-vit+fully-integer", "timm swin"), ("fq-vit", "torchvision vit")],
)
def test_mixed_precision_lowers_to_integers(recipe, name):
    bits = "w6a6s4" if recipe == "fq-vit" else "w6a6s5"
    table, model, images = measured(name, recipe, bits=bits, candidates=(5, 7))
    mixed, chosen = table.allocate(mean_bits=6, by="output-error")
    quantized = vitquant.quantize(model, mixed, images.split(2))
    with torch.no_grad():
        found, simulated = interpreted(vitquant.lower(quantized))(images), ExactSimulation(quantized)(images).float()
    assert torch.equal(found, simulated)
    assert len({spec.bits for spec in (a.spec for a in quantized.assignments.values()) if spec}) > 2
    assert len(set(chosen.bits.values())) > 1


def test_probabilities_with_bits_of_their_own_keep_them():
    table, _, _ = measured("timm deit", "repq-vit", bits="w6a6s4", candidates=(5, 6))
    quantized_with = table.with_bits(dict.fromkeys(table.numbers, 5), "hand")
    assert not any(rule.name == "attention-probs-5-bits" for rule in quantized_with.rules)
    table, _, _ = measured("timm deit", "repq-vit", bits="w6a6", candidates=(5, 6))
    assert any(
        rule.name == "attention-probs-5-bits" for rule in table.with_bits(dict.fromkeys(table.numbers, 5), "").rules
    )


def test_a_rule_for_certain_sites_keeps_to_them():
    settings = ["activations.site=['blocks.*.mlp.*']", *QUICK]
    model, images = made("timm deit")
    table = vitquant.sensitivity(model, "vt-ptq", images.split(2), settings=settings, bits="w6a6", candidates=(5, 7))
    recipe = table.with_bits({name: 5 if name.endswith("attn") else 7 for name in table.numbers}, "hand")
    rules = {rule.name: rule for rule in recipe.rules}
    assert set(rules["activations-7-bits"].value) == {
        f"blocks.{i}.mlp.{fc}:input" for i in (0, 1) for fc in ("fc1", "fc2")
    }
    assert "activations-5-bits" not in rules
    assert {name.split(".")[2] for name in rules["weights-5-bits"].value} == {"attn"}
    other = vitquant.quantize(model, load_recipe("vt-ptq"), images.split(2), settings=QUICK)
    with pytest.raises(RecipeError, match=r"names blocks\.1\..*, which this model does not have"):
        assign(recipe, recipe.bits, [value for value in other.values if "blocks.1" not in value.name])


def test_names_that_are_another_library_s_paths_are_not_taken_for_them():
    """The model's own `blocks.1` is the first that has attention, and is called blocks.0."""

    class Shifted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            vit, _ = made("timm deit")
            self.vit = vit
            first, second = vit.blocks
            vit.blocks = torch.nn.Sequential(torch.nn.Identity(), first, second)

        def forward(self, images):
            return self.vit(images)

    model, images = Shifted().eval().vit, made("timm deit")[1]
    table = vitquant.sensitivity(model, "vt-ptq", images.split(2), settings=QUICK, bits="w6a6", candidates=(4, 8))
    wanted = {"blocks.0.attn": 4, "blocks.0.mlp": 4, "blocks.1.attn": 8, "blocks.1.mlp": 8}
    recipe = table.with_bits(wanted, "hand")
    quantized = vitquant.quantize(model, replace(recipe, methods=recipe.methods[:1]), images.split(2))
    for module, rules in table.values.items():
        for name in (name for names in rules.values() for name in names):
            assert quantized.assignments[name].spec.bits == wanted[module]


def test_any_cost_that_adds_up_can_be_allocated_by(deit):
    table = deit[0]
    times = {name: {bits: 1.0 if bits <= 4 else 2.0 for bits in table.candidates} for name in table.numbers}
    costs = Costs(times, "ms", fixed=3.0)
    _, chosen = table.allocate(within=(3.0 + 6.0, costs), by="output-error")
    assert sorted(chosen.bits.values()) == [4, 4, 8, 8]
    del times["blocks.0.mlp"][6]
    with pytest.raises(AllocationError, match=r"costs say nothing of blocks\.0\.mlp at 6 bits"):
        table.allocate(within=(9.0, costs))


def test_the_front_falls_from_the_smallest_to_the_largest(deit):
    table = deit[0]
    front = pareto_front(table.choices("nuclear-norm", table.mean_bits()))
    costs = table.mean_bits()
    assert costs.total(front[0].cost) == 4
    assert costs.total(front[-1].cost) <= 8
    for a, b in itertools.pairwise(front):
        assert a.cost < b.cost
        assert a.sensitivity > b.sensitivity


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"mean_bits": 3}, r"3 bits in the mean: these candidates need between 4 and 8"),
        ({"mean_bits": 8.5}, r"8\.5 bits in the mean: .* between 4 and 8"),
        ({"megabytes": 100}, r"100 MB: these candidates need between 0\.\d+ and 0\.\d+"),
        ({}, r"give one target"),
        ({"mean_bits": 6, "megabytes": 1}, r"give one target"),
        ({"mean_bits": 6, "by": "hessian"}, r"'hessian' is unknown; .* nuclear-norm, output-error, correlation"),
    ],
)
def test_targets_without_an_answer_are_refused(deit, target, message):
    with pytest.raises(AllocationError, match=message):
        deit[0].allocate(**target)


@pytest.mark.parametrize("candidates", [(6,), (), (1, 4), (4, 17)])
def test_candidates_without_meaning_are_refused(candidates):
    model, images = made("timm deit")
    with pytest.raises(AllocationError, match=r"give two or more bit widths from 2 to 16"):
        vitquant.sensitivity(model, "vt-ptq", [images], candidates=candidates)


def test_settings_of_the_search_are_checked():
    model, images = made("timm deit")
    with pytest.raises(RecipeError, match="candidates = 'many' should be an integer"):
        vitquant.sensitivity(model, "vt-ptq", [images], settings=["search-scales.candidates=many"])


def test_images_that_can_be_read_once_are_refused():
    model, images = made("timm deit")
    with pytest.raises(CalibrationError, match="reads the images several times"):
        vitquant.sensitivity(model, "vt-ptq", iter([images]))
    with pytest.raises(CalibrationError, match="no calibration images"):
        vitquant.sensitivity(model, "vt-ptq", [])


def test_a_recipe_whose_bits_are_numbers_has_nothing_to_allocate():
    model, images = made("timm deit")
    recipe = load_recipe("vt-ptq")
    fixed = [replace(rule, spec=replace(rule.spec, bits=8)) for rule in recipe.rules]
    with pytest.raises(AllocationError, match="bits are a symbol"):
        vitquant.sensitivity(model, replace(recipe, rules=tuple(fixed)), [images])


def test_dead_channels_and_constant_images_are_measured():
    model, _ = made("timm deit")
    with torch.no_grad():
        for parameter in (model.blocks[0].mlp.fc2.weight, model.blocks[0].mlp.fc2.bias, model.blocks[1].norm1.weight):
            parameter.zero_()
    table = vitquant.sensitivity(model, "vt-ptq", [torch.ones(2, 3, 32, 32)], candidates=(4, 8), settings=QUICK)
    silent = next(each for each in table.modules if each.name == "blocks.0.mlp")
    assert (silent.output_error, silent.nuclear_sensitivity, silent.correlation) == (0.0, 0.0, 0.0)
    recipe, _ = table.allocate(mean_bits=5)
    vitquant.quantize(model, recipe, [torch.ones(2, 3, 32, 32)])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_is_read_back_as_it_was_written(deit, tmp_path, encoding):
    path = tmp_path / "sensitivity.json"
    path.write_text(deit[0].to_json(), encoding=encoding)
    assert SensitivityTable.from_json(path) == deit[0]


def edited(key, change):
    return lambda table: json.dumps({**table, key: change(table[key])})


@pytest.mark.parametrize(
    "damage",
    [
        lambda table: "{",
        lambda table: "[]",
        lambda table: "[" * 100_000,
        lambda table: json.dumps({key: value for key, value in table.items() if key != "values"}),
        edited("format", lambda _: 2),
        edited("modules", lambda _: []),
        edited("modules", lambda modules: modules[1:]),
        edited("modules", lambda modules: [{**each, "bits": 4} for each in modules]),
        edited("modules", lambda modules: [{**each, "output_error": None} for each in modules]),
        edited("modules", lambda modules: [{**each, "output_error": float("nan")} for each in modules]),
        edited("modules", lambda modules: [{**each, "bits": str(int(each["bits"]) + 60)} for each in modules]),
        edited("numbers", lambda _: 3),
        edited("numbers", lambda _: {}),
        edited("numbers", lambda numbers: dict.fromkeys(numbers, 0)),
        edited("bytes", lambda sizes: {name: {"4": 1} for name in sizes}),
        edited("bytes", lambda sizes: {name: dict.fromkeys(of, -1) for name, of in sizes.items()}),
        edited("values", lambda values: {name: {"other": ["blocks.0.attn.qkv:input"]} for name in values}),
        edited("values", lambda values: {name: {"weights": "abc"} for name in values}),
        edited("recipe", lambda recipe: {**recipe, "rule": []}),
    ],
)
def test_a_damaged_table_is_refused_by_name(deit, tmp_path, damage):
    path = tmp_path / "sensitivity.json"
    path.write_text(damage(json.loads(deit[0].to_json())))
    with pytest.raises(AllocationError, match=r"sensitivity\.json"):
        SensitivityTable.from_json(path)
    with pytest.raises(AllocationError, match=r"cannot be read: No such file"):
        SensitivityTable.from_json(tmp_path / "none.json")


def test_a_width_that_a_scheme_does_not_have_is_refused_before_any_work():
    model, images = made("timm deit")
    told = []
    with pytest.raises(AllocationError, match=r"candidate 10, rule 'attention-probs'.*at most 8 bits.*--set attention"):
        vitquant.sensitivity(model, "repq-vit", [images], candidates=(6, 8, 10), progress=lambda *s: told.append(s))
    assert not told


def test_what_is_quantized_last_is_measured_too():
    """The quantizer of the logits, and that of a map that is a module's output."""
    model, images = made("timm deit")
    table = vitquant.sensitivity(model, "fq-vit", images.split(2), bits="w4a4s4", candidates=(3, 4))
    sites = {each.name: each for each in table.sites}
    assert sites["output"].output_error > 0
    assert sites["output"].correlation < 1
    assert table.modules
    assert all(each.squared_error > 0 for each in table.modules)
    assert sites["patch_embed"].bits == "8/4"


def test_images_of_windows_and_channels_last_are_one_matrix_of_tokens():
    """torchvision's Swin keeps height and width apart; its MLPs have the nuclear norm of (tokens, channels)."""
    model, images = made("torchvision swin")
    table = vitquant.sensitivity(model, "vt-ptq", images.split(2), settings=QUICK, candidates=(6, 8))
    held = []
    block = model.features[1][0]
    block.mlp.register_forward_hook(lambda _, given, made: held.append(made))
    with torch.no_grad():
        model(images)
    expected = torch.linalg.svdvals(held[0].flatten(1, 2)).sum(1).mean()
    found = next(each for each in table.modules if each.name == "blocks.0.mlp")
    assert found.nuclear_norm == pytest.approx(float(expected), rel=1e-4)


def test_measuring_by_batches_is_measuring_at_once_and_the_same_every_time():
    model, images = made("timm deit", count=10)
    tables = [
        vitquant.sensitivity(model, "vt-ptq", images.split(size), candidates=(4, 6), bits="w6a6")
        for size in (10, 10, 3)
    ]
    assert tables[0] == tables[1]
    for once, parts in zip(tables[0].modules, tables[2].modules, strict=True):
        assert parts.output_error == pytest.approx(once.output_error, rel=1e-3)
        assert parts.nuclear_sensitivity == pytest.approx(once.nuclear_sensitivity, rel=1e-3)


def test_the_order_of_images_does_not_matter_and_may_change_with_every_pass():
    model, images = made("timm deit", count=12)

    class Shuffled:
        passes = 0

        def __iter__(self):
            self.passes += 1
            order = torch.randperm(12, generator=torch.Generator().manual_seed(self.passes))
            return iter(images[order].split(5))

    recipe = replace(load_recipe("vt-ptq"), methods=load_recipe("vt-ptq").methods[:1])
    found = vitquant.sensitivity(model, recipe, Shuffled(), candidates=(4, 6), bits="w6a6")
    expected = vitquant.sensitivity(model, recipe, [images], candidates=(4, 6), bits="w6a6")
    for one, other in zip((*found.modules, *found.sites), (*expected.modules, *expected.sites), strict=True):
        assert one.nuclear_sensitivity == pytest.approx(other.nuclear_sensitivity, rel=1e-3)
        assert one.output_error == pytest.approx(other.output_error, rel=1e-3)


def test_work_is_reported_as_it_goes():
    model, images = made("timm deit")
    told = []
    vitquant.sensitivity(model, "vt-ptq", [images], candidates=(4, 8), progress=lambda *step: told.append(step))
    assert {what for what, _, _ in told} == {"calibrating", "searching layers", "measuring"}
    assert all(0 <= done <= total for _, done, total in told)
    told.clear()
    vitquant.quantize(model, "vt-ptq", [images], settings=QUICK, progress=lambda *step: told.append(step))
    assert told[0][:2] == ("searching layers", 0)
    assert told[-1][1] == told[-1][2] > 8

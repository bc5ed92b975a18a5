"""The embedded model and images, and the command that shows recipes on them."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import vitquant
from vitquant import demo, workflows
from vitquant.cli import main
from vitquant.demo import embedded
from vitquant.recipe import Bits, load_recipe
from vitquant.tasks.classification import paired_interval
from vitquant.tasks.images import batches, load_listing

REPOSITORY = Path(__file__).parents[2]
DATA = REPOSITORY / "src" / "vitquant" / "demo"
SIZES = {"test": 1000, "train": 256}


@pytest.fixture
def run(capsys):
    """Run the demo in this process, with an hour for a busy machine: exit code, stdout, stderr."""

    def run(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["demo", "--threads", "1", "--minutes", "60", *map(str, words)])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The package with 40 test and 40 calibration images and two recipes: one is coarse, the other takes all day."""
    labels = json.loads((DATA / "labels.json").read_text())
    for split in SIZES:
        with Image.open(DATA / f"{split}.png") as sheet:
            (tmp_path / "data").mkdir(exist_ok=True)
            sheet.crop((0, 0, 1024, 40)).save(tmp_path / "data" / f"{split}.png")
    labels |= {split: labels[split][:40] for split in SIZES}
    (tmp_path / "data" / "labels.json").write_text(json.dumps(labels))
    (tmp_path / "data" / "weights.safetensors").write_bytes((DATA / "weights.safetensors").read_bytes())
    monkeypatch.setattr(embedded, "_FOLDER", tmp_path / "data")
    coarse = replace(load_recipe("minmax"), bits=Bits.parse("w3a3"))
    all_day = replace(coarse, name="all-day", relative_cost=10**6)
    monkeypatch.setattr("vitquant.recipe.available", lambda: [all_day, coarse])


# What the package carries


@pytest.mark.parametrize(("split", "count"), SIZES.items())
def test_a_sheet_has_one_image_a_row_and_a_class_for_each(split, count):
    with Image.open(DATA / f"{split}.png") as sheet:
        assert (sheet.size, sheet.mode) == ((1024, count), "RGB")
    labels = json.loads((DATA / "labels.json").read_text())
    assert len(labels[split]) == count
    assert set(labels[split]) == set(range(10))
    assert len(set(labels["classes"])) == 10


def test_the_weights_are_half_precision_and_below_six_megabytes():
    path = DATA / "weights.safetensors"
    assert path.stat().st_size <= 6_000_000
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F16"}
    parameters = demo.model().state_dict()
    assert set(parameters) == set(names)
    assert {tensor.dtype for tensor in parameters.values()} == {torch.float32}


def test_model_and_normalization_are_those_of_the_training_script():
    written = {}
    for node in ast.parse((REPOSITORY / "demo" / "train.py").read_text()).body:
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], ast.literal_eval(node.value)
            pairs = zip(target.elts, value, strict=True) if isinstance(target, ast.Tuple) else [(target, value)]
            written |= {name.id: part for name, part in pairs}
    assert written["ARCHITECTURE"] == embedded.ARCHITECTURE
    assert (written["MEAN"], written["STD"]) == (demo.PREPROCESSING.mean, demo.PREPROCESSING.std)


def test_the_embedded_model_is_the_plain_timm_one():
    from safetensors.torch import load_file
    from timm.models.vision_transformer import VisionTransformer

    plain = VisionTransformer(**embedded.ARCHITECTURE).eval()
    plain.load_state_dict(load_file(DATA / "weights.safetensors"))
    images, _ = demo.batches("test", 8)[0]
    with torch.inference_mode():
        assert torch.equal(demo.model()(images), plain(images))


def test_the_model_has_learned_something():
    (images, labels), *_ = demo.batches("test", 200)
    with torch.inference_mode():
        assert (demo.model()(images).argmax(1) == labels).float().mean() > 0.3  # 0.1 is chance


def test_the_folder_of_images_gives_the_same_batches(small, tmp_path):
    demo.write_folder(tmp_path / "images")
    demo.write_folder(tmp_path / "images")  # its own work may be written again
    read = batches(load_listing(tmp_path / "images"), demo.PREPROCESSING, 16)
    for (images, labels), (expected, classes) in zip(read, demo.batches("test", 16), strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, classes)


# What the command prints and writes


def test_the_demo_prints_true_facts(small, run, tmp_path):
    code, out, err = run("--output", tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    (row,) = facts["recipes"]
    assert (facts["test_images"], facts["calibration_images"]) == (40, 40)
    assert (row["recipe"], row["bits"], row["directory"]) == ("minmax", "w3a3", str(tmp_path / "out" / "minmax"))
    model, quantized = demo.model(), vitquant.load(row["directory"])
    test = demo.batches("test", 32)
    labels = torch.cat([classes for _, classes in test])
    with torch.inference_mode():
        reference, answered = (torch.cat([net(x).argmax(1) for x, _ in test]) for net in (model, quantized))
    assert facts["float_top1"] == pytest.approx(100 * (reference == labels).double().mean())
    assert row["top1"] == pytest.approx(100 * (answered == labels).double().mean())
    assert row["difference"] == pytest.approx(row["top1"] - facts["float_top1"]) != 0
    assert row["difference_interval"] == list(paired_interval(answered == labels, reference == labels))
    assert row["agreement"] == pytest.approx(100 * (answered == reference).double().mean())
    assert facts["float_bytes"] == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert row["bytes"] == (tmp_path / "out" / "minmax" / "model.safetensors").stat().st_size
    assert quantized.provenance["calibration"]["images"] == 40


def test_what_became_integer_is_what_inspect_says(small, run, tmp_path, capsys):
    (row,) = json.loads(run("--output", tmp_path / "out", "--json")[1])["recipes"]
    with pytest.raises(SystemExit):
        main(["inspect", row["directory"], "--json"])
    summary = json.loads(capsys.readouterr().out)["summary"]
    counts = summary["operations"]
    assert row["integer_operations"] == counts["integer"] > 0
    assert row["arithmetic_operations"] == counts["integer"] + counts["float"]
    assert row["quantized_macs_percent"] == summary["quantized_macs_percent"]


def test_recipes_that_do_not_fit_are_listed_with_the_reason(small, run, tmp_path):
    facts = json.loads(run("--output", tmp_path / "out", "--json")[1])
    (left,) = facts["left_out"]
    assert (left["recipe"], left["relative_cost"]) == ("all-day", 10**6)
    assert left["estimated_seconds"] > 3600
    assert "of 3600 s are left" in left["reason"]
    assert not (tmp_path / "out" / "all-day").exists()


def test_without_time_every_recipe_is_left_out_the_cheap_first(small, run, tmp_path):
    code, out, err = run("--output", tmp_path / "out", "--minutes", 0, "--json")
    facts = json.loads(out)
    assert (code, err, facts["recipes"]) == (0, "", [])
    assert [left["recipe"] for left in facts["left_out"]] == ["minmax", "all-day"]


def test_the_table_says_how_to_go_on_and_it_works(small, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    code, out, err = run()
    assert (code, err) == (0, "")
    lines = out.splitlines()
    row = next(line for line in lines if line.startswith("minmax "))
    assert any(line.split() == ["written", "to", "vitquant-demo/minmax"] for line in lines)
    assert any(line.startswith("no all-day ") and "would take about" in line for line in lines)
    for name in ("inspect", "evaluate"):
        words = next(line for line in lines if f"vitquant {name} " in line).split("vitquant ", 1)[1].split()
        with pytest.raises(SystemExit) as ended:
            main([*words, "--json"])
        assert ended.value.code == 0
        printed = json.loads(capsys.readouterr().out)
    assert f"{printed['top1']:.1f}" == row.split()[2]
    assert printed["float_top1"] is not None


def test_every_recipe_starts_from_the_seed_and_an_interrupt_leaves_nothing(small, run, tmp_path, monkeypatch):
    recipes = [load_recipe("minmax"), load_recipe("percentile")]
    monkeypatch.setattr("vitquant.recipe.available", lambda: recipes)
    quantize, seeds = workflows.quantize, []

    def interrupted(*arguments, **settings):
        seeds.append(torch.initial_seed())
        torch.manual_seed(1)  # as a recipe may
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return quantize(*arguments, **settings)

    monkeypatch.setattr(workflows, "quantize", interrupted)
    assert run("--output", tmp_path / "out", "--seed", 7) == (130, "", "interrupted; nothing was written\n")
    assert seeds == [7, 7]
    assert not (tmp_path / "out").exists()


# What it refuses


@pytest.mark.parametrize("occupied", ["minmax/thesis.tex", "test-images/thesis.tex", "test-images", ""])
def test_directories_that_hold_something_else_are_refused_before_the_work(small, run, tmp_path, monkeypatch, occupied):
    monkeypatch.setattr("vitquant.demo.model", lambda: pytest.fail("the work was begun"))
    path = tmp_path / "out" / occupied
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("years of work")
    for words in ([], ["--force"]):
        code, out, err = run("--output", tmp_path / "out", *words)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert str(tmp_path / "out") in err
    assert path.read_text() == "years of work"


def test_an_earlier_demo_is_replaced_by_force_only(small, run, tmp_path):
    assert run("--output", tmp_path / "out", "--quiet") == (0, "", "")
    code, _, err = run("--output", tmp_path / "out")
    assert (code, "--force" in err) == (2, True)
    (tmp_path / "out" / "minmax" / "integer.onnx").write_text("exported")
    assert run("--output", tmp_path / "out", "--quiet", "--force") == (0, "", "")
    assert sorted(path.name for path in (tmp_path / "out" / "minmax").iterdir()) == ["config.json", "model.safetensors"]
    for name in ("mine", "minmax/mine", "test-images/mine"):
        (tmp_path / "out" / name).write_text("years of work")
        code, _, err = run("--output", tmp_path / "out", "--force")
        assert (code, f"holds {name}, which is not of a demo" in err) == (2, True)
        (tmp_path / "out" / name).unlink()


# The estimate


def test_the_estimate_grows_with_what_there_is_to_do():
    seconds = demo.estimated_seconds(1, 256, 1000, 0.004)
    assert demo.estimated_seconds(101, 256, 1000, 0.004) - seconds >= 100 * 256 * 0.004
    assert demo.estimated_seconds(1, 256, 2000, 0.004) - seconds >= 1000 * 0.004
    assert demo.estimated_seconds(1, 256, 1000, 0.0) > 0  # capturing takes its time on any machine

"""The command line as a user meets it: what it does, and what it refuses."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from command_line import ARGUMENTS, MODEL, landscape_words, quantize_words, sensitivity_words, state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

FIGURES = ["task", "engine", "images", "top1", "top5", "float_top1", "agreement", "top1_difference_interval", "seconds"]
FIGURES += ["doubt", "file"]
FACTORIES = """
import torch
from torch import nn

def vit(**arguments):
    import timm
    print("a factory that prints")
    return timm.create_model("vit_tiny_patch16_224", **arguments)

def convolutions():
    return nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)
    yield "python:my_factories"
    sys.modules.pop("my_factories", None)


# What the commands do


def test_importing_the_command_line_imports_neither_torch_nor_typer():
    code = "import sys, vitquant.cli; sys.exit(bool({'torch', 'typer', 'rich'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_quantize_writes_a_model_with_all_that_made_it(run, workshop, tmp_path):
    out = tmp_path / "out"
    words = quantize_words(
        workshop / "images", out, "--images", 12, "--bits", "w4a8", weights=workshop / "weights.safetensors"
    )
    code, printed, err = run(*words, "--set", "weights.bits=6", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(printed)
    assert (facts["recipe"], facts["bits"], facts["calibration"]["images"]) == ("minmax", "w4a8", 12)
    assert facts["bytes"] < facts["float_bytes"] / 2
    config = json.loads((out / "config.json").read_text())
    assert config["source"]["weights"] == str(workshop / "weights.safetensors")
    assert len(config["source"]["weights_sha256"]) == 64
    assert config["preprocessing"]["input_size"] == [3, 64, 64]
    recorded = {key: config["calibration"][key] for key in ("images", "batch", "seed", "directory")}
    assert recorded == {"images": 12, "batch": 10, "seed": 0, "directory": str(workshop / "images")}
    assert config["quantization_config"]["operands"]["head:weight"]["spec"]["bits"] == 6


def test_fewer_images_than_the_recipe_asks_for_are_all_used_and_that_is_said(run, workshop, tmp_path):
    code, out, err = run(*quantize_words(workshop / "images", tmp_path / "out"))
    assert code == 0
    assert err == f"note: all 20 images of {workshop / 'images'} were used; minmax asks for 1000\n"
    assert "20 images of" in out
    assert "patch_embed (input 8 bits, weight 8 bits); head (input 8 bits, weight 8 bits)" in " ".join(out.split())


def test_without_a_recipe_the_model_runs_in_integers(run, workshop, tmp_path):
    words = [
        word for word in quantize_words(workshop / "images", tmp_path / "out") if word not in ("--recipe", "minmax")
    ]
    code, out, _ = run(*words, "--bits", "w4a8", "--json", "--set", "reconstruct-output.steps=2")
    assert code == 0
    facts = json.loads(out)
    assert (facts["recipe"], facts["bits"]) == (
        "repq-vit+reconstructed-output+fully-integer+wide-residual",
        "w4a8s5",
    )
    _, out, _ = run("evaluate", tmp_path / "out", "--data", workshop / "images", "--json")
    assert json.loads(out)["engine"] == "integer"


def test_the_weights_that_were_taken_are_said_and_others_taken_by_their_key(run, workshop, tmp_path):
    averaged = {name: tensor * 1.5 for name, tensor in state_dict().items()}
    torch.save({"model": state_dict(), "model_ema": averaged, "epoch": 3}, tmp_path / "checkpoint.pth.tar")
    given = {"weights": tmp_path / "checkpoint.pth.tar"}
    code, _, said = run(*quantize_words(workshop / "images", tmp_path / "averaged", **given))
    assert code == 0
    assert "weights are 'model_ema'; 'model' beside it: --weights-key takes another" in said
    code, _, said = run(*quantize_words(workshop / "images", tmp_path / "plain", "--weights-key", "model", **given))
    assert code == 0
    assert "model_ema" in said
    # the same weights as those of a file of their own, and `evaluate` compares with them again
    tensors = "model.safetensors"
    assert (tmp_path / "plain" / tensors).read_bytes() == (workshop / "out" / tensors).read_bytes()
    assert (tmp_path / "averaged" / tensors).read_bytes() != (workshop / "out" / tensors).read_bytes()
    found = [
        json.loads(run("evaluate", out, "--data", workshop / "images", "--json")[1])["float_top1"]
        for out in (tmp_path / "plain", workshop / "out")
    ]
    assert found[0] == found[1]


def test_the_seed_decides_every_byte(run, workshop, tmp_path):
    written = {}
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        words = quantize_words(workshop / "images", tmp_path / name, "--seed", seed, "--images", 10)
        assert run(*words, "--quiet") == (0, "", "")
        written[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert written["first"] == written["again"]
    weights = {name: load_file(tmp_path / name / "model.safetensors")["pos_embed"] for name in written}
    assert not torch.equal(weights["first"], weights["other"])
    configs = [(tmp_path / name / "config.json").read_bytes() for name in ("first", "again")]
    assert configs[0] == configs[1]


def test_evaluate_prints_the_figures_and_nothing_else(run, workshop):
    code, out, err = run("evaluate", workshop / "out", "--data", workshop / "images", "--json", "--batch", 7)
    assert (code, err) == (0, "")
    figures = json.loads(out)
    assert list(figures) == FIGURES
    assert (figures["engine"], figures["images"]) == ("simulated", 20)
    low, high = figures["top1_difference_interval"]
    assert low <= figures["top1"] - figures["float_top1"] <= high


def test_evaluate_shows_a_table(run, workshop):
    code, out, err = run("evaluate", workshop / "out", "--data", workshop / "images")
    assert (code, err) == (0, "")
    assert {"images", "top-1", "float", "agreement", "engine"} <= {line.split()[0] for line in out.splitlines()}


def test_float_weights_that_are_gone_are_noted_and_those_given_are_used(run, workshop, refused):
    weights, moved = workshop / "weights.safetensors", workshop / "moved.safetensors"
    words = ("evaluate", workshop / "out", "--data", workshop / "images", "--json")
    weights.rename(moved)
    try:
        code, out, err = run(*words)
        assert code == 0
        assert err.count("\n") == 1
        assert str(weights) in err
        figures = json.loads(out)
        assert [figures[key] for key in ("float_top1", "agreement", "top1_difference_interval")] == [None] * 3
        assert json.loads(run(*words, "--weights", moved)[1])["float_top1"] is not None
        assert "absent.safetensors" in refused(*words, "--weights", "absent.safetensors")
    finally:
        moved.rename(weights)


def test_inspect_lists_operations_as_json_and_as_a_table(run, workshop):
    code, out, err = run("inspect", workshop / "out", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    names = [operation["name"] for operation in report["operations"]]
    assert "blocks.0.attn.scores" in names
    assert report["engine"] == "simulated"
    assert sum(report["summary"]["operations"].values()) == len(names)
    code, out, err = run("inspect", workshop / "out")
    assert (code, err) == (0, "")
    assert "blocks.0.attn.scores" in out
    assert "permute" not in out


def test_sensitivity_shows_every_module_and_site_as_a_table_and_as_json(run, workshop, sensitivities):
    written = sorted(path.name for path in sensitivities.parent.iterdir())
    assert written == ["sensitivity.json", "sensitivity.png"]
    with Image.open(sensitivities.with_suffix(".png")) as figure:
        assert min(figure.size) > 500
    code, out, err = run(*sensitivity_words(workshop, "--candidates", "4,8"))
    assert (code, err) == (0, "")
    assert "blocks.0.attn.context" in out
    assert "modules at 4, 8 bits" in out
    code, out, err = run(*sensitivity_words(workshop, "--candidates", "4,8", "--json"))
    values = json.loads(out)
    assert [(each["name"], each["bits"]) for each in values["modules"]] == [
        (f"blocks.0.{part}", bits) for bits in ("4", "8") for part in ("attn", "mlp")
    ]
    assert {each["name"] for each in values["sites"]} >= {"patch_embed", "blocks.0.mlp.fc1", "head"}


def test_a_landscape_is_a_figure_and_its_numbers(run, refused, workshop, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    out = tmp_path / "landscape"
    code, shown, err = run(*landscape_words(workshop, "--output", out))
    assert (code, err) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == ["landscape.json", "landscape.png"]
    with Image.open(out / "landscape.png") as figure:
        assert min(figure.size) > 500
    folded = " ".join(shown.split())
    assert "searched simulation" in folded
    assert "192 of block 0: blocks.0.attn.qkv:weight, blocks.0.attn.proj:weight" in folded
    assert "4 of " in folded
    numbers = json.loads((out / "landscape.json").read_text())
    assert [line["name"] for line in numbers["lines"]] == ["random 1", "searched"]
    assert [list(line["curves"]) for line in numbers["lines"]] == [["simulation", "integers"]] * 2
    assert (numbers["calibration"]["images"], numbers["held_out"]["images"]) == (4, 3)
    code, shown, err = run(*landscape_words(workshop, "--output", out, "--force", "--json"))
    assert (code, err) == (0, "")
    assert json.loads(shown).items() >= numbers.items()
    code, shown, err = run(*landscape_words(workshop, "--recipe", "minmax"))
    assert code == 0
    assert "not measured: minmax leaves operations in float" in " ".join(shown.split())
    assert "--force" in refused(*landscape_words(workshop, "--output", out))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--block", 1], "the model has no block 1; its blocks are 0 to 0"),
        (["--reach", 1], "reach = 1.0"),
        (["--reach", "nan"], "--reach"),
        (["--points", 2], "points = 2"),
        (["--loss", "l2"], "loss = 'l2' is unknown"),
        (["--held-out", 17], "4 images and 17 to hold out asked for, 20 there; give --images 3 or less"),
        (["--held-out", 20], "20 there; hold out fewer"),
        (["--held-out", 1], "held-out batch 1 has one image, and infonce"),
        (["--memory-budget", 0], "memory = 0.0"),
        (["--set", "evolve-scales.sites=['head']"], "sites that match head"),
    ],
)
def test_landscapes_that_cannot_be_measured_are_refused(refused, workshop, tmp_path, words, message):
    assert message in refused(*landscape_words(workshop, "--output", tmp_path / "out", *words))


def test_bits_are_allocated_and_the_recipe_quantizes(run, workshop, sensitivities, tmp_path):
    recipe, figure = tmp_path / "mixed.toml", tmp_path / "front.png"
    words = ("allocate", sensitivities, "--mean-bits", 5.5, "--output", recipe, "--figure", figure)
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert "bits in the mean" in out
    with Image.open(figure) as image:
        assert min(image.size) > 300
    code, out, err = run(*words, "--force", "--json")
    values = json.loads(out)
    assert values["cost"] <= 5.5
    assert values["sensitivity"] <= values["uniform"]["5"]["sensitivity"]
    words = quantize_words(workshop / "images", tmp_path / "out", "--recipe", recipe, "--set", "search-scales.rounds=1")
    assert run(*words, "--quiet") == (0, "", "")
    operands = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["operands"]
    for part in ("attn.qkv", "mlp.fc1"):
        bits = values["bits"][f"blocks.0.{part.partition('.')[0]}"]
        assert operands[f"blocks.0.{part}:weight"]["spec"]["bits"] == bits


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mean-bits", "3"], "3 bits in the mean: these candidates need between 4 and 8"),
        (["--megabytes", "50"], "50 MB: these candidates need between"),
        ([], "give one target"),
        (["--mean-bits", "6", "--by", "hessian"], "nuclear-norm, output-error, correlation"),
    ],
)
def test_bits_that_cannot_be_allocated_are_refused(refused, sensitivities, tmp_path, words, message):
    assert message in refused("allocate", sensitivities, *words, "--output", tmp_path / "mixed.toml")


def test_what_sensitivity_and_allocate_cannot_read_or_write_is_refused(refused, workshop, sensitivities, tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    assert "broken.json" in refused("allocate", broken, "--mean-bits", 6, "--output", tmp_path / "mixed.toml")
    taken = tmp_path / "taken.toml"
    taken.write_text("")
    assert "--force" in refused("allocate", sensitivities, "--mean-bits", 6, "--output", taken)
    assert "ends in .toml" in refused("allocate", sensitivities, "--mean-bits", 6, "--output", tmp_path / "mixed")
    same = ("--output", tmp_path / "mixed.toml", "--figure", tmp_path / "mixed.toml")
    assert "ends in .png" in refused("allocate", sensitivities, "--mean-bits", 6, *same)
    assert "--force" in refused(*sensitivity_words(workshop, "--output", sensitivities.parent))
    assert "--candidates '4;8'" in refused(*sensitivity_words(workshop, "--candidates", "4;8"))
    assert "no bit width" in refused(*sensitivity_words(workshop, "--bits", "w6"))
    assert "from 2 to 16" in refused(*sensitivity_words(workshop, "--candidates", "1,8"))


def test_a_memory_budget_is_the_search_s(run, refused, workshop, tmp_path):
    words = quantize_words(workshop / "images", tmp_path / "out", "--recipe", "vt-ptq", "--images", 10)
    assert "give memory =" in refused(*words, "--memory-budget", "0.001")
    assert "it is positive" in refused(*words, "--memory-budget", "0")
    quick = ["--set", "search-scales.candidates=3", "--set", "search-scales.rounds=1"]
    assert run(*words, *quick, "--memory-budget", "0.5", "--quiet") == (0, "", "")
    words = quantize_words(workshop / "images", tmp_path / "minmax", "--images", 10)
    code, _, err = run(*words, "--memory-budget", 1)
    assert (code, err) == (
        0,
        "note: minmax holds a batch at a time: --memory-budget changes nothing\n",
    )


def test_recipes(run):
    code, out, err = run("recipes", "--json")
    assert (code, err) == (0, "")
    recipes = {recipe["name"]: recipe for recipe in json.loads(out)["recipes"]}
    assert recipes["minmax"]["bits"] == "w8a8"
    assert {"paper", "cost", "expected"} <= set(recipes["minmax"])
    assert "minmax" in run("recipes")[1]


def test_a_factory_is_imported_again_only_when_its_name_is_repeated(run, refused, workshop, tmp_path, factories):
    name = f"{factories}:vit"
    arguments = [f"--model-arg={key}={value}" for key, value in ARGUMENTS.items()]
    steps = tmp_path / "steps.toml"
    steps.write_text("input_size = [3, 64, 64]\n")
    out = tmp_path / "out"
    words = quantize_words(workshop / "images", out, "--preprocessing", steps, model=[name, *arguments])
    code, printed, err = run(*words, "--json")
    assert code == 0
    assert json.loads(printed)["model"] == name  # what the factory printed is not there
    assert "a factory that prints" in err
    assert "repeat it: --model" in refused("inspect", out)
    code, printed, _ = run("inspect", out, "--model", name, "--all")
    assert code == 0
    assert "permute" in printed  # moves data
    assert f"was made from {name}, not from" in refused("inspect", out, "--model", "python:my_factories:broken")


def test_preprocessing_of_a_file_replaces_keys_and_is_saved(run, workshop, tmp_path):
    steps = tmp_path / "steps.toml"
    steps.write_text('interpolation = "bilinear"\nmean = [0.1, 0.2, 0.3]\n')
    run(*quantize_words(workshop / "images", tmp_path / "out", "--preprocessing", steps))
    saved = json.loads((tmp_path / "out" / "config.json").read_text())["preprocessing"]
    assert (saved["interpolation"], saved["mean"], saved["input_size"]) == ("bilinear", [0.1, 0.2, 0.3], [3, 64, 64])


def test_quiet_says_nothing_and_version_its_number(run):
    assert run("recipes", "--quiet") == (0, "", "")
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("vitquant 0.")
    code, out, _ = run()
    assert code == 2
    assert "quantize" in out


# Bad input


def test_missing_images_are_named_and_counted_or_left_out(run, refused, workshop, tmp_path):
    listing = ["file,class_index\n", *(f"{p},{p.parent.name[-1]}\n" for p in (workshop / "images").rglob("*.png"))]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "labels.csv").write_text("".join([*listing, "absent.png,3\n"]))
    err = refused("evaluate", workshop / "out", "--data", tmp_path / "data")
    assert "1 of 21 images cannot be read" in err
    assert "absent.png" in err
    code, out, err = run("evaluate", workshop / "out", "--data", tmp_path / "data", "--skip-bad-images", "--json")
    assert (code, json.loads(out)["images"]) == (0, 20)
    assert "1 images were left out" in err
    assert "absent.png" in err


def test_unreadable_images_are_named_and_counted_or_left_out(run, refused, workshop, tmp_path):
    shutil.copytree(workshop / "images", tmp_path / "images")
    (tmp_path / "images" / "class_3" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing of an image")
    words = quantize_words(tmp_path / "images", tmp_path / "out", "--images", 21)
    err = refused(*words)
    assert "1 of the first" in err
    assert "bad.png" in err
    code, out, err = run(*words, "--skip-bad-images", "--json")
    assert (code, json.loads(out)["calibration"]["images"]) == (0, 20)
    assert "bad.png" in err


def test_folders_are_the_classes_that_a_file_says(run, refused, workshop, tmp_path):
    """Ten folders of others names, in another order: asked for, and then as if they had been named by their indices."""
    names = ["ten", "one", "six", "two", "eve", "bob", "dot", "cat", "egg", "fig", "unused"]
    for index in range(10):
        shutil.copytree(workshop / "images" / f"class_{index}", tmp_path / "images" / names[index])
    (tmp_path / "classes.csv").write_text("".join(f"{name},{min(i, 9)}\n" for i, name in enumerate(names)))
    words = ("evaluate", workshop / "out", "--data", tmp_path / "images", "--json")
    code, out, err = run(*words, "--classes", tmp_path / "classes.csv")
    expected = json.loads(run("evaluate", workshop / "out", "--data", workshop / "images", "--json")[1])
    assert (code, err) == (0, "")
    assert {**json.loads(out), "seconds": 0} == {**expected, "seconds": 0}
    assert "folders are classes 0 to 9 by their sorted names, bob to two" in run(*words)[2]
    (tmp_path / "images" / "eve").rename(tmp_path / "images" / "test")  # no part of a data set where the file names it
    (tmp_path / "classes.csv").write_text((tmp_path / "classes.csv").read_text().replace("eve", "test"))
    assert json.loads(run(*words, "--classes", tmp_path / "classes.csv")[1])["top1"] == expected["top1"]
    assert "holds test, parts of a data set" in refused(*words)
    (tmp_path / "images" / "test").rename(tmp_path / "images" / "eve")
    shutil.rmtree(tmp_path / "images" / "egg")
    assert "but the model has 10 classes" in (err := refused(*words))
    assert "give --classes FILE" in err
    (tmp_path / "classes.csv").write_text("ten,10\n")
    assert "classes.csv: class index '10'" in refused(*words, "--classes", tmp_path / "classes.csv")


def test_labels_in_another_order_are_doubted(run, workshop, tmp_path):
    """The label of an image is the class after the one that the float model gives it."""
    import timm

    from vitquant.tasks.images import batches, load_listing
    from vitquant.tasks.preprocessing import Preprocessing

    saved = json.loads((workshop / "out" / "config.json").read_text())["preprocessing"]
    model = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS).eval()
    model.load_state_dict(load_file(workshop / "weights.safetensors"))
    items = load_listing(workshop / "images")
    [(images, _)] = batches(items, Preprocessing.from_dict(saved), 20)
    with torch.no_grad():
        predicted = model(images).argmax(dim=1).tolist()
    rows = [f"{item.path},{(index + 1) % 10}\n" for item, index in zip(items, predicted, strict=True)]
    (tmp_path / "labels.csv").write_text("".join(["file,class_index\n", *rows]))
    code, out, err = run("evaluate", workshop / "out", "--data", tmp_path, "--json")
    doubt = json.loads(out)["doubt"]
    assert code == 0
    assert doubt
    assert f"note: {doubt}\n" in err


def test_features_are_evaluated_beside_the_float_model_alone(run, refused, workshop, tmp_path):
    model = [word for word in MODEL if "num_classes" not in word] + ["--model-arg=num_classes=0"]
    save_file(state_dict(num_classes=0), tmp_path / "weights.safetensors")
    (tmp_path / "images").mkdir()
    for name in ("any", "folders", "42x"):
        shutil.copytree(workshop / "images" / "class_0", tmp_path / "images" / name)
    (tmp_path / "images" / "any" / "photo.HEIC").touch()
    words = quantize_words(
        tmp_path / "images", tmp_path / "out", "--batch", 6, weights=tmp_path / "weights.safetensors", model=model
    )
    code, _, err = run(*words)
    assert code == 0
    assert "are not read as images: 1 .heic" in err
    words = ["evaluate", tmp_path / "out", "--data", tmp_path / "images" / "any", "--quiet"]
    assert "it gives features, not classes" in refused(*words, "--task", "classification")
    code, out, err = run(*words, "--json")
    assert (code, json.loads(out)["task"], len(json.loads(out)["outputs"])) == (0, "features", 1)
    (tmp_path / "weights.safetensors").unlink()
    assert "features are compared with those of the float model, which is not there" in refused(*words)


def test_labels_out_of_range_are_refused_before_the_run(refused, workshop, tmp_path):
    image = next((workshop / "images").rglob("*.png"))
    (tmp_path / "labels.csv").write_text(f"file,class_index\n{image},10\n")
    err = refused("evaluate", workshop / "out", "--data", tmp_path)
    assert "class index 10, but the model has 10 classes" in err


def test_images_without_labels_are_refused(refused, workshop, tmp_path):
    shutil.copy(next((workshop / "images").rglob("*.png")), tmp_path / "one.png")
    assert "no label" in refused("evaluate", workshop / "out", "--data", tmp_path)


def test_an_empty_directory_is_refused(refused, workshop, tmp_path):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused("evaluate", workshop / "out", "--data", tmp_path / "empty")
    assert str(tmp_path / "empty") in refused(*quantize_words(tmp_path / "empty", tmp_path / "out"))


def test_fewer_calibration_images_than_a_batch_are_refused(refused, workshop, tmp_path):
    # The weights do not exist: the images are counted first.
    err = refused(*quantize_words(workshop / "images", tmp_path / "out", "--batch", 21, weights="absent.safetensors"))
    assert "20 calibration images are less than a batch of 21" in err
    err = refused(*quantize_words(workshop / "images", tmp_path / "out", "--images", 9))
    assert "9 calibration images are less than a batch of 10" in err
    assert "21 images asked for, 20 there" in refused(
        *quantize_words(workshop / "images", tmp_path / "out", "--images", 21)
    )


def test_a_batch_is_no_more_than_the_images_there_are(run, workshop, tmp_path):
    words = [
        word for word in quantize_words(workshop / "images", tmp_path / "out", "--images", 12) if word != "--batch"
    ]
    words.remove("10")  # that of the batch
    code, printed, _ = run(*words, "--json")
    assert code == 0
    assert json.loads(printed)["calibration"]["batch"] == 12


@pytest.mark.parametrize("model", ["timm:deit_tiny_patch16_225", "torchvision:vit_b_17", "transformers:vot"])
def test_an_unknown_model_is_refused_before_the_images_are(refused, tmp_path, model):
    err = refused(*quantize_words(tmp_path / "absent", tmp_path / "out", model=[model]))
    assert "did you mean" in err
    assert "absent" not in err


def test_weights_that_do_not_fit_are_refused_by_their_keys(refused, workshop, tmp_path):
    save_file(state_dict(depth=2), tmp_path / "deep.safetensors")
    err = refused(*quantize_words(workshop / "images", tmp_path / "out", weights=tmp_path / "deep.safetensors"))
    assert "unexpected: blocks.1." in err
    err = refused(*quantize_words(workshop / "images", tmp_path / "out", weights=tmp_path / "absent.safetensors"))
    assert "absent.safetensors" in err


def test_weights_that_are_not_finite_are_refused_by_name(refused, workshop, tmp_path):
    weights = load_file(workshop / "weights.safetensors")
    weights["blocks.0.mlp.fc1.weight"][3, 5] = float("nan")
    save_file(weights, tmp_path / "weights.safetensors")
    err = refused(*quantize_words(workshop / "images", tmp_path / "out", weights=tmp_path / "weights.safetensors"))
    assert "blocks.0.mlp.fc1.weight" in err


def test_activations_that_are_not_finite_are_refused_by_site(refused, workshop, tmp_path):
    weights = load_file(workshop / "weights.safetensors")
    weights["blocks.0.mlp.fc1.bias"][:] = 3e38
    weights["blocks.0.mlp.fc2.weight"][:] = 3e38
    save_file(weights, tmp_path / "weights.safetensors")
    err = refused(*quantize_words(workshop / "images", tmp_path / "out", weights=tmp_path / "weights.safetensors"))
    assert "blocks.0." in err


def test_a_layer_norm_gain_of_zero_simply_works(run, workshop, tmp_path):
    weights = load_file(workshop / "weights.safetensors")
    weights["blocks.0.norm1.weight"][[0, 7]] = 0
    weights["norm.weight"][:] = 0
    save_file(weights, tmp_path / "weights.safetensors")
    out = tmp_path / "out"
    code, _, _ = run(*quantize_words(workshop / "images", out, weights=tmp_path / "weights.safetensors"))
    assert code == 0
    code, printed, _ = run("evaluate", out, "--data", workshop / "images", "--json")
    assert (code, json.loads(printed)["agreement"]) == (0, 100.0)  # the head sees the same for every image


def test_a_model_without_attention_is_refused(refused, workshop, tmp_path, factories):
    words = quantize_words(workshop / "images", tmp_path / "out", model=[f"{factories}:convolutions"])
    assert "no attention" in refused(*words)


def test_images_of_another_size_are_refused(refused, workshop, tmp_path):
    steps = tmp_path / "steps.toml"
    steps.write_text("input_size = [3, 96, 96]\n")
    err = refused(*quantize_words(workshop / "images", tmp_path / "out", "--preprocessing", steps))
    assert "96" in err
    err = refused("evaluate", workshop / "out", "--data", workshop / "images", "--preprocessing", steps)
    assert str(steps) in err
    assert "[3, 64, 64]" in err


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["--recipe", "minmaks"], "minmax"),
        (["--bits", "w1a8"], "w1a8"),
        (["--set", "weihgts.bits=4"], "weights"),
        (["--preprocessing", "absent.toml"], "absent.toml"),
        (["--model-arg", "depth"], "depth"),
        (["--imagse", "3"], "--imagse"),
        (["--images", "none"], "--images"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_words_that_are_not_understood_are_named(refused, workshop, tmp_path, words, culprit):
    assert culprit in refused(*quantize_words(workshop / "images", tmp_path / "out", *words))


def test_commands_and_models_that_do_not_exist_are_named(refused, workshop, tmp_path):
    assert "'quantise'" in refused("quantise")
    assert "--calibration" in refused("quantize", "timm:deit_tiny_patch16_224", "--output", tmp_path / "out")
    err = refused(*quantize_words(workshop / "images", tmp_path / "out", model=["timm:deit_tiny_patch16_225"]))
    assert "deit_tiny_patch16_224" in err
    assert str(tmp_path) in refused("inspect", tmp_path / "out")


def test_a_fault_of_ours_is_one_line_and_a_traceback_only_with_debug(run, workshop, monkeypatch):
    def fault(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("vitquant.loading.load", fault)
    code, out, err = run("inspect", workshop / "out")
    assert (code, out) == (1, "")
    assert err == "internal error: RuntimeError: two lines; run with --debug\n"
    code, _, err = run("inspect", workshop / "out", "--debug")
    assert code == 1
    assert "Traceback" in err


def test_a_refusal_shows_a_traceback_with_debug(run, workshop):
    code, _, err = run("inspect", workshop / "absent", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert "error: " in err.splitlines()[-1]

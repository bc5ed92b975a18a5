"""`vitquant sweep`: every combination, one table, nothing twice, and side by side the same."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vitquant.errors import CalibrationError, CheckpointError, RecipeError
from vitquant.prepared import Request
from vitquant.recipe import load_recipe
from vitquant.schema import Plain, TableOf
from vitquant.sweep import Row, Setup, Sweep, Variant, run_sweep
from vitquant.workers.jobs import Results, run_jobs
from vitquant.workers.processes import Processes

ARGUMENTS = ["depth=1", "embed_dim=48", "num_heads=3", "img_size=64", "num_classes=10"]
MODEL = ["timm:vit_tiny_patch16_224", *(f"--model-arg={each}" for each in ARGUMENTS)]
GRIDS = """
format = 1
seeds = [0, 1]

[[grid]]
recipes = ["minmax"]
bits = ["w8a8"]

[[grid]]
recipes = ["minmax"]
bits = ["w8a8"]
settings = [[], ["weights.observer=omse"]]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of ten classes, a few of them to evaluate on."""
    folder = tmp_path_factory.mktemp("sweep")
    generator = torch.Generator().manual_seed(0)
    for index in range(30):
        kind = "calibration" if index < 20 else "evaluation"
        path = folder / kind / f"class_{index % 10}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(path)
    return folder


def words(folder: Path, file: Path, output: Path, *others: Any) -> list[str]:
    given = ["--weights", "random", "--calibration", folder / "calibration", "--data", folder / "evaluation"]
    return [
        str(each) for each in ("sweep", MODEL[0], file, *MODEL[1:], *given, "--images", 12, "--output", output, *others)
    ]


def written(folder: Path, text: str) -> Path:
    file = folder / "sweep.toml"
    file.write_text(text)
    return file


def setup(folder: Path) -> Setup:
    request = Request(
        MODEL[0], folder / "calibration", "random", None, 12, None, None, ARGUMENTS, 0, 0, False
    )  # fmt: skip
    return Setup(request, {"evaluation": folder / "evaluation"})


def test_every_combination_is_a_variant_once(tmp_path: Path) -> None:
    sweep = Sweep.read(written(tmp_path, GRIDS))
    assert sweep.seeds == (0, 1)
    assert [str(each) for each in sweep.variants] == ["minmax w8a8", "minmax w8a8 weights.observer=omse"]
    assert Sweep.read(written(tmp_path, 'format = 1\n[[grid]]\nrecipes = ["fq-vit"]')) == Sweep(
        (Variant("fq-vit", None, ()),), (0,)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'format' is missing"),
        ("format = 2\n[[grid]]\nrecipes = ['minmax']", "format = 2 should be an integer from 1 to 1"),
        ("format = 1", "'grid' is missing"),
        ("format = 1\n[[grid]]\nrecipes = []", "recipes"),
        ("format = 1\n[[grid]]\nrecipe = ['minmax']", "unknown key 'recipe'; did you mean 'recipes'"),
        ("format = 1\n[[grid]]\nrecipes = ['minmaks']", "minmaks: .*did you mean 'minmax'"),
        ("format = 1\n[[grid]]\nrecipes = ['minmax']\nbits = ['w99']", "minmax w99: "),
        (
            "format = 1\n[[grid]]\nrecipes = ['minmax']\nsettings = [['weihgts.bits=4']]",
            "weihgts.*did you mean 'weights'",
        ),
        ("format = 1\nseeds = [-1]\n[[grid]]\nrecipes = ['minmax']", r"seeds\[0\] = -1"),
        ("format = 1\n[[grid", "sweep.toml"),
        ("format = 1\nseeds = 3\n[[grid]]\nrecipes = ['minmax']", "seeds = 3 should be a list"),
        ("format = 1\n[[grid]]\nrecipes = ['minmax']\nbits = 'w8a8'", "bits = 'w8a8' should be a list"),
        (f"format = 1\nseeds = {list(range(900))}\n[[grid]]\nrecipes = {['minmax'] * 12}", "more than 10,000 runs"),
    ],
)
def test_a_file_that_describes_no_sweep_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Sweep.read(written(tmp_path, text))
    with pytest.raises(RecipeError, match=r"nothing\.toml"):
        Sweep.read(tmp_path / "nothing.toml")


def test_the_table_has_every_variant_and_what_is_there_is_not_run_again(
    run: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "runs"
    code, out, _ = run(*words(folder, written(tmp_path, GRIDS), output, "--json"))
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [(row["recipe"], row["bits"]) for row in rows] == [("minmax", "w8a8")] * 2
    assert [row["settings"] for row in rows] == [[], ["weights.observer=omse"]]
    for row in rows:
        assert row["failures"] == {}
        agreement = row["figures"]["agreement"]
        assert agreement["values"].keys() == {"0", "1"}
        assert agreement["smallest"] <= agreement["mean"] <= agreement["largest"]
        assert {"top-1", "float top-1", "seconds"} <= row["figures"].keys()
    files = sorted(output.glob("*.json"))
    assert len([each for each in files if each.name != "run.json"]) == 4
    times = [each.stat().st_mtime_ns for each in files]
    again = run(*words(folder, tmp_path / "sweep.toml", output, "--json"))
    assert json.loads(again[1]) == json.loads(out)
    assert [each.stat().st_mtime_ns for each in files] == times
    more = GRIDS.replace("seeds = [0, 1]", "seeds = [0, 7]")
    code, out, _ = run(*words(folder, written(tmp_path, more), output))
    assert code == 0
    assert "weights.observer=omse" in out
    assert len(list(output.glob("*.json"))) == 7
    assert not list(output.glob("*.work"))


def test_side_by_side_the_models_are_the_same(folder: Path, tmp_path: Path) -> None:
    sweep = Sweep((Variant("minmax", "w8a8", ()), Variant("minmax", "w4a8", ())), (0, 3))
    alone = run_sweep(sweep, setup(folder), tmp_path / "alone")
    with Processes.opened(2) as workers:
        beside = run_sweep(sweep, setup(folder), tmp_path / "beside", workers)

    def models(folder: Path) -> dict[str, str]:
        return {each.name: json.loads(each.read_text())["model"] for each in folder.glob("minmax*.json")}

    assert models(tmp_path / "alone") == models(tmp_path / "beside")
    assert len(set(models(tmp_path / "alone").values())) == 4
    for one, two in zip(alone, beside, strict=True):
        assert {**one.figures, "seconds": {}} == {**two.figures, "seconds": {}}


def test_a_run_that_is_refused_does_not_end_the_others_and_the_exit_code_says_it(
    run: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path
) -> None:
    grids = """
        format = 1
        [[grid]]
        recipes = ["evol-q"]
        settings = [["evolve-scales.blocks=[7]"]]
        [[grid]]
        recipes = ["minmax"]
    """
    code, out, err = run(*words(folder, written(tmp_path, grids), tmp_path / "runs", "--json"))
    assert code == 1
    refused, done = json.loads(out)["rows"]
    message = "evolve-scales: the model has no block 7; its blocks are 0 to 0"
    assert (refused["figures"], refused["failures"]) == ({}, {"0": message})
    assert err.strip().endswith(f"evol-q evolve-scales.blocks=[7], seed 0: {message}")
    assert done["failures"] == {}
    assert done["figures"]["agreement"]["values"].keys() == {"0"}
    code, out, _ = run(*words(folder, tmp_path / "sweep.toml", tmp_path / "runs"))
    assert code == 1
    assert f"seed 0: {message}" in " ".join(out.split())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--calibration": "nothing"}, "nothing"),
        ({"--data": "nothing"}, "nothing"),
        ({"--classes": "nothing"}, "nothing: No such file"),
        ({"--weights": "nothing.safetensors"}, "nothing.safetensors"),
        ({"--preprocessing": "nothing.toml"}, "nothing.toml"),
        ({"--images": 999}, "999 images asked for"),
        ({"--workers": "1.5"}, "workers = 1.5: it is a number of processes"),
        ({"--task": "wrong"}, "wrong"),
        ({"MODEL": "timm:vit_tinny_patch16_224"}, "vit_tinny"),
    ],
)
def test_what_no_run_could_use_is_refused_before_the_first(
    run: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    given = words(folder, written(tmp_path, GRIDS), tmp_path / "runs")
    for key, value in changed.items():
        if key == "MODEL":
            given[1] = value
        elif key in given:
            given[given.index(key) + 1] = str(value)
        else:
            given += [key, str(value)]
    code, out, err = run(*given)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_the_results_of_other_inputs_are_not_taken_for_these(folder: Path, tmp_path: Path) -> None:
    sweep = Sweep((Variant("minmax", "w8a8", ()),), (0,))
    shutil.copytree(folder / "evaluation", tmp_path / "images")
    steps = tmp_path / "steps.toml"
    steps.write_text("crop_pct = 1.0")
    given = Setup(replace(setup(folder).request, preprocessing=steps), {"evaluation": tmp_path / "images"})
    run_sweep(sweep, given, tmp_path / "runs")
    other = Setup(given.request, {"evaluation": folder / "calibration"})
    with pytest.raises(CheckpointError, match="another run, with another evaluation set"):
        run_sweep(sweep, other, tmp_path / "runs")
    steps.write_text("crop_pct = 0.9")
    with pytest.raises(CheckpointError, match="another run, with another preprocessing"):
        run_sweep(sweep, given, tmp_path / "runs")
    steps.write_text("crop_pct = 1.0")
    image = next((tmp_path / "images").rglob("*.png"))
    image.write_bytes(next((folder / "calibration").rglob("*.png")).read_bytes())
    with pytest.raises(CheckpointError, match="another run, with another evaluation set"):
        run_sweep(sweep, given, tmp_path / "runs")


def test_other_labels_of_the_same_images_are_another_sweep_and_another_place_is_not(
    folder: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in (folder / "evaluation").rglob("*.png"):
        shutil.copy(path, images)
    (images / "labels.csv").write_text("file,class_index\n20.png,0\n21.png,1\n")
    given = Setup(setup(folder).request, {"evaluation": images})
    before = given.identity()
    moved = shutil.copytree(images, tmp_path / "moved")
    assert replace(given, evaluation={"evaluation": moved}).identity() == before
    (images / "labels.csv").write_text("file,class_index\n20.png,0\n21.png,2\n")
    assert {key for key, value in given.identity().items() if value != before[key]} == {"evaluation set"}


def test_a_damaged_or_forged_result_is_named(folder: Path, tmp_path: Path) -> None:
    sweep = Sweep((Variant("minmax", "w8a8", ()),), (0,))
    run_sweep(sweep, setup(folder), tmp_path / "runs")
    (file,) = (tmp_path / "runs").glob("minmax*.json")
    forged = [
        '{"figures": {"top-1": "abc"}}',
        '{"figures": {"a\\u001b[31m": 1}}',
        '{"figures": [1]}',
        '{"figures": {"a": NaN}}',
    ]
    for text in ("{", "[1]", "", "{}", '{"figures": {}, "more": 1}', *forged):
        file.write_text(text)
        with pytest.raises(CheckpointError, match=rf"{file.name}.*remove it, and the run is repeated"):
            run_sweep(sweep, setup(folder), tmp_path / "runs")


def test_the_name_of_a_recipe_is_no_path_and_an_edited_recipe_is_another_run(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    text = load_recipe("minmax").to_toml()
    recipe.write_text(text.replace('name = "minmax"', 'name = "../escaped"', 1))
    sweep = Sweep((Variant(str(recipe), "w8a8", ()),), (0,))
    run_sweep(sweep, setup(folder), tmp_path / "in" / "runs")
    first = {each.name for each in (tmp_path / "in" / "runs").glob("*escaped-*.json")}
    assert len(first) == 1
    assert not list(tmp_path.glob("*escaped*"))
    assert not list((tmp_path / "in").glob("*escaped*"))
    recipe.write_text(text.replace('name = "minmax"', 'name = "../escaped"', 1).replace('"minmax"', '"omse"'))
    run_sweep(sweep, setup(folder), tmp_path / "in" / "runs")
    assert len(set((tmp_path / "in" / "runs").glob("*escaped-*.json"))) == 2


def test_a_sweep_that_was_killed_in_mid_search_goes_on_there(folder: Path, tmp_path: Path) -> None:
    settings = ["evolve-scales.passes=150", "evolve-scales.relative=true", "evolve-scales.wide_mutation=0.01"]
    grids = f"format = 1\n[[grid]]\nrecipes = ['evol-q']\nbits = ['w8a8']\nsettings = [{settings}]"
    command = [
        sys.executable,
        "-c",
        "from vitquant.cli import main; main()",
        *words(folder, written(tmp_path, grids), tmp_path / "runs", "--quiet"),
    ]
    part = "*.work/3-correct-weights.safetensors"
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "runs").glob(part)) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        process.kill()
    assert list((tmp_path / "runs").glob(part))
    assert subprocess.run([*command, "--json"], capture_output=True, timeout=500).returncode == 0
    whole = run_sweep(Sweep.read(tmp_path / "sweep.toml"), setup(folder), tmp_path / "whole")
    models = [
        json.loads(next((tmp_path / name).glob("evol-q*.json")).read_text())["model"] for name in ("runs", "whole")
    ]
    assert models[0] == models[1]
    assert whole[0].failures == {}


def test_an_interrupt_names_the_directory_in_which_the_sweep_continues(
    folder: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vitquant.sweep.default_engine", interrupt)
    output = tmp_path / "runs"
    kept = f"interrupted; {output} keeps what was done, and the same command continues there\n"
    assert run(*words(folder, written(tmp_path, GRIDS), output)) == (130, "", kept)


# --- jobs ---


def squared(job: int) -> dict[str, Any]:
    if job < 0:
        raise CalibrationError(f"{job} is negative")
    return {"square": job * job}


@pytest.mark.parametrize("side_by_side", [False, True])
def test_jobs_give_results_in_order_and_keep_what_is_no_error(tmp_path: Path, side_by_side: bool) -> None:
    jobs = {str(each): each for each in (3, -1, 2, 5)}
    results = Results(tmp_path, TableOf(Plain()), RecipeError)
    results.keep("2", {"square": "kept"})
    told: list[tuple[int, int]] = []
    if side_by_side:
        with Processes.opened(2) as workers:
            found = run_jobs(squared, jobs, results, workers, lambda _, *counts: told.append(counts))
        assert not multiprocessing.active_children()
    else:
        found = run_jobs(squared, jobs, results, None, lambda _, *counts: told.append(counts))
    assert list(found) == ["3", "-1", "2", "5"]
    assert (found["3"], found["2"], found["5"]) == ({"square": 9}, {"square": "kept"}, {"square": 25})
    assert str(found["-1"]) == "-1 is negative"
    assert results.read("-1") is None
    assert results.read("5") == {"square": 25}
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_what_a_job_needed_is_removed_once_its_result_is_kept_and_not_before(tmp_path: Path) -> None:
    results, seen = Results(tmp_path, TableOf(Plain()), RecipeError), list[str]()

    def forget(key: str, result: dict[str, Any]) -> None:
        assert results.read(key) == result
        seen.append(key)

    results.keep("2", {"square": 4})  # by a run that was killed right after
    run_jobs(squared, {str(each): each for each in (3, -1, 2)}, results, kept=forget)
    assert seen == ["2", "3"]


def test_a_row_tells_the_spread() -> None:
    row = Row(Variant("minmax", None, ()), "photos", {"top-1": {0: 1.0, 2: 3.0}}, {1: "no"}).to_dict()
    assert row["figures"]["top-1"] == {"mean": 2.0, "smallest": 1.0, "largest": 3.0, "values": {"0": 1.0, "2": 3.0}}
    assert row["failures"] == {"1": "no"}


def test_several_calibration_sets_are_rows_of_one_table(
    run: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, 'format = 1\nseeds = [0, 1]\n[[grid]]\nrecipes = ["minmax", "omse"]\nbits = ["w8a8"]')
    made = ["--calibration", "synthetic:uniform-noise", "--calibration", "made=synthetic"]
    made += ["--synthesis", "iterations=2", "--synthesis", "warmup=1"]
    given = words(folder, file, tmp_path / "runs", "--json", *made)
    code, out, err = run(*given)
    assert code == 0, err
    rows = json.loads(out)["rows"]
    sets = ["calibration", "synthetic:uniform-noise", "made"]
    assert [(row["recipe"], row["calibration"]) for row in rows] == [
        (recipe, name) for recipe in ("minmax", "omse") for name in sets
    ]
    results = [each for each in (tmp_path / "runs").glob("*.json") if each.name != "run.json"]
    assert len({json.loads(each.read_text())["model"] for each in results}) == 12
    assert len(list((tmp_path / "runs").glob("*.images"))) == 4  # one for each seed, which every recipe is run on
    assert not list((tmp_path / "runs").glob("*.work"))
    shutil.rmtree(next((tmp_path / "runs").glob("psaq-vit-*.images")))
    monkeypatch.setattr("vitquant.sweep.images_for", lambda *_: pytest.fail("images were made for kept results"))
    assert json.loads(run(*given)[1]) == json.loads(out)
    code, out, _ = run(*given[: given.index("--json")])  # with one set its rows have no name
    assert (code, "minmax w8a8," in out) == (0, False)
    again = [*given, "--calibration", str(folder / "calibration")]
    assert "two are named calibration" in run(*again)[2]


def test_images_that_cannot_be_made_are_failures_of_their_rows(
    run: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, 'format = 1\n[[grid]]\nrecipes = ["minmax", "omse"]')
    asked: list[object] = []

    def refuse(*given: object) -> None:
        asked.append(given)
        raise CalibrationError("the loss is not finite")

    monkeypatch.setattr("vitquant.sweep.images_for", refuse)
    code, out, _ = run(*words(folder, file, tmp_path / "runs", "--json", "--calibration", "synthetic"))
    assert code == 1
    there, made, *others = json.loads(out)["rows"]
    assert there["failures"] == {}
    assert made["failures"] == others[1]["failures"] == {"0": "the loss is not finite"}
    assert len(asked) == 1  # not once for every recipe


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--synthesis", "iterations=2"], "no calibration set has settings"),
        (["--calibration", "cifar="], "give NAME=DIR"),
        (["--calibration", "=photos"], "give NAME=DIR"),
        (["--calibration", "synthetic:psaq"], "did you mean psaq-vit"),
    ],
)
def test_calibration_sets_that_mean_nothing_are_refused(
    run: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path, given: list[str], message: str
) -> None:
    code, _, err = run(*words(folder, written(tmp_path, GRIDS), tmp_path / "runs"), *given)
    assert (code, err.count("\n"), message in err) == (2, 1, True), err

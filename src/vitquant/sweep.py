"""Sweeps: quantize and evaluate one model by several recipes, bits, settings and seeds."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vitquant.engines import default_engine
from vitquant.errors import RecipeError, VitquantError
from vitquant.image_folders import evaluation_images
from vitquant.model.saved import digest, finite
from vitquant.parsing import parse_toml, read_file
from vitquant.prepared import Request, prepare
from vitquant.progress import Progress, silent
from vitquant.recipe import requested
from vitquant.schema import Integer, ListOf, Table, Text, check
from vitquant.tasks.classification import ClassificationResult
from vitquant.tasks.features import FeaturesResult
from vitquant.tasks.images import batches
from vitquant.work import WorkDirectory
from vitquant.workers.jobs import Results, run_jobs
from vitquant.workers.worker import Workers
from vitquant.workflows import quantize, task_for

_LONGEST = 2**20  # bytes of a sweep's file
_BATCH = 32  # images to evaluate at a time
_WORDS = ListOf(Text(), least=1, most=1000)
_SCHEMA = Table(
    {
        "format": Integer(1, 1),
        "grid": ListOf(
            Table({"recipes": _WORDS}, {"bits": _WORDS, "settings": ListOf(ListOf(Text(), most=1000), 1, 1000)}),
            1,
            1000,
        ),
    },
    {"seeds": ListOf(Integer(0, 2**62), least=1, most=1000)},
)


@dataclass(frozen=True)
class Variant:
    """What is compared: a recipe with its bits and settings.

    Arguments:
        recipe: its name, as for `quantize`.
        bits: as for `quantize`; the recipe's own when None.
        settings: TARGET.KEY=VALUE each.
    """

    recipe: str
    bits: str | None
    settings: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.recipe, *([] if self.bits is None else [self.bits]), *self.settings))


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep: every variant with every seed."""

    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]

    @classmethod
    def read(cls, file: str | Path) -> Sweep:
        """The sweep that a TOML file describes.

        Arguments:
            file: with `format = 1`, `seeds` ([0] when absent) and one or more `[[grid]]`, each with `recipes`, `bits`
                and `settings` (lists of TARGET.KEY=VALUE), of which every combination is a variant.

        Raises:
            RecipeError: the file cannot be read, a key does not fit, or there is no such recipe, bits or setting.
        """
        try:
            table = parse_toml(read_file(Path(file), _LONGEST, RecipeError), RecipeError)
            check(table, _SCHEMA, RecipeError)
        except RecipeError as error:
            raise RecipeError(f"{file}: {error}") from None
        variants = dict.fromkeys(
            Variant(recipe, bits, tuple(settings))
            for grid in table["grid"]
            for recipe, bits, settings in product(grid["recipes"], grid.get("bits", [None]), grid.get("settings", [[]]))
        )
        for each in variants:  # refused before any of them runs
            try:
                requested(each.recipe, each.bits, each.settings)
            except RecipeError as error:
                raise RecipeError(f"{file}: {each}: {error}") from None
        return cls(tuple(variants), tuple(dict.fromkeys(table.get("seeds", [0]))))


@dataclass(frozen=True)
class Setup:
    """What all runs of a sweep have in common.

    Arguments:
        request: the model and its calibration images; each run has its own seed.
        evaluation: directories of images to evaluate on, by name.
        classes: a file that says which class a folder is, see `tasks.classes_file`.
        task: as for `quantize`.
        memory: as for `quantize`.
        simulated: whether to accept models that do not lower.
    """

    request: Request
    evaluation: Mapping[str, Path]
    classes: Path | None = None
    task: str | None = None
    memory: float = 4.0
    simulated: bool = False

    def identity(self) -> dict[str, Any]:
        """What another sweep in the same directory must have in common, as plain JSON values."""
        values = {**asdict(self), "evaluation": dict(self.evaluation)}
        del values["memory"], values["request"]["image_workers"], values["request"]["seed"]
        return json.loads(json.dumps(values, default=str))


@dataclass(frozen=True)
class _Job:
    """One run. `work`: where its state is kept until it ends."""

    setup: Setup
    variant: Variant
    seed: int
    work: Path


@dataclass(frozen=True)
class Row:
    """The figures of a variant.

    Arguments:
        variant: the recipe, bits and settings.
        figures: for each measure the value of each seed that has one.
        failures: the errors of the other seeds, one line each.
    """

    variant: Variant
    figures: Mapping[str, Sequence[float]]
    failures: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: mean, smallest and largest of each measure too."""
        spread = {
            name: {
                "mean": statistics.mean(values),
                "smallest": min(values),
                "largest": max(values),
                "values": list(values),
            }
            for name, values in self.figures.items()
        }
        return {**asdict(self.variant), "figures": spread, "failures": list(self.failures)}


def run_sweep(
    sweep: Sweep,
    setup: Setup,
    directory: str | Path,
    workers: Workers | None = None,
    progress: Progress = silent,
) -> list[Row]:
    """Run every variant with every seed, and gather their figures.

    Arguments:
        sweep: the variants and seeds.
        setup: the model, its images and what else they have in common.
        directory: keeps the result of every run as it ends, and the state of unfinished ones: a later call with the
            same setup runs only what is missing, so that variants and seeds can be added.
        workers: run as many side by side as they are, and share the memory; None runs one after another.
        progress: called with the number of runs that are done, and of all.

    Returns:
        A row for each variant, in order.

    Raises:
        CheckpointError: the directory is in use, of another setup, or holds something else.
    """
    directory = Path(directory)
    share = setup if workers is None else replace(setup, memory=setup.memory / workers.count)
    with WorkDirectory.opened(directory, {"sweep": setup.identity()}):
        jobs: dict[str, _Job] = {}
        keys: dict[tuple[Variant, int], str] = {}
        for variant, seed in product(sweep.variants, sweep.seeds):
            key = _key(variant, seed)
            keys[variant, seed] = key
            jobs[key] = _Job(share, variant, seed, directory / f"{key}.work")
        found = run_jobs(_run, jobs, Results(directory, RecipeError), workers, progress)
    return [_row(variant, [found[keys[variant, seed]] for seed in sweep.seeds]) for variant in sweep.variants]


def _key(variant: Variant, seed: int) -> str:
    """The name of a run: what is computed, whatever its recipe is called."""
    recipe, bits = requested(variant.recipe, variant.bits, variant.settings)
    text = json.dumps([recipe.to_dict(), str(bits), seed], sort_keys=True)
    return f"{recipe.name[:60]}-{sha256(text.encode()).hexdigest()[:16]}"


def _run(job: _Job) -> dict[str, Any]:
    """Quantize and evaluate a model: plain JSON values."""
    setup, variant = job.setup, job.variant
    recipe, bits = requested(variant.recipe, variant.bits, variant.settings)
    prepared = prepare(replace(setup.request, seed=job.seed), recipe, torch.device("cpu"))
    started = time.perf_counter()
    model = quantize(
        prepared.network,
        recipe,
        prepared.data,
        bits=str(bits),
        simulated=setup.simulated,
        source=prepared.source,
        preprocessing=prepared.steps.to_dict(),
        task=setup.task,
        seed=job.seed,
        memory=setup.memory,
        work=job.work,
    )
    seconds = time.perf_counter() - started
    engine, computed, _ = default_engine(model)
    task = task_for(model)
    results: dict[str, Any] = {}
    for name, folder in setup.evaluation.items():
        items = evaluation_images(folder, model, task, prepared.network, setup.classes)
        found = batches(items, prepared.steps, _BATCH, 0, setup.request.skip_bad_images)
        results[name] = task.evaluate(computed, prepared.network, found, silent, engine)
    shutil.rmtree(job.work, ignore_errors=True)
    return {
        **asdict(variant),
        "seed": job.seed,
        "recipe_bits": str(bits),
        "model": digest(model),
        "calibration": model.provenance["calibration"],
        "seconds": seconds,
        "engine": engine,
        "records": [{"method": each.method, "summary": finite(dict(each.summary))} for each in model.records],
        "evaluation": {name: finite(asdict(each)) for name, each in results.items()},
        "figures": _figures(results) | _losses(model.records) | {"seconds": seconds},
    }


def _figures(results: Mapping[str, ClassificationResult | FeaturesResult]) -> dict[str, float]:
    """What a table shows of the evaluations, by the names of measure and directory."""
    found: dict[str, float | None] = {}
    for name, result in results.items():
        of = f", {name}" if len(results) > 1 else ""
        if isinstance(result, ClassificationResult):
            found |= {f"float top-1{of}": result.float_top1, f"top-1{of}": result.top1}
            found[f"agreement{of}"] = result.agreement
            continue
        for output in result.outputs:
            found[f"cosine, {output.name}{of}"] = output.cosine
            found[f"same neighbour, {output.name}{of}"] = output.neighbours
    return {name: value for name, value in found.items() if value is not None}


def _losses(records: Sequence[Any]) -> dict[str, float]:
    """The losses before and after searches, for those that tell them."""
    return {key: each.summary[key] for each in records for key in ("loss before", "loss after") if key in each.summary}


def _row(variant: Variant, results: Sequence[dict[str, Any] | VitquantError]) -> Row:
    done = [each["figures"] for each in results if not isinstance(each, VitquantError)]
    names = dict.fromkeys(name for each in done for name in each)
    figures = {name: [each[name] for each in done if name in each] for name in names}
    failures = dict.fromkeys(str(each) for each in results if isinstance(each, VitquantError))
    return Row(variant, figures, tuple(failures))

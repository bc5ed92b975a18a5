"""Sweeps: quantize and evaluate one model by several recipes, bits, settings, calibration sets and seeds."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import torch

from vitquant.engines import default_engine
from vitquant.errors import CheckpointError, DataError, RecipeError, VitquantError
from vitquant.files import sha256 as sha256_of
from vitquant.image_folders import CalibrationImages, evaluation_images
from vitquant.model import Record
from vitquant.model.saved import digest, finite
from vitquant.parsing import parse_toml, read_file
from vitquant.prepared import (
    USUAL_COUNT,
    Effort,
    Request,
    Synthetic,
    built,
    check_count,
    images_for,
    named_source,
    prepare,
)
from vitquant.progress import Progress, silent
from vitquant.recipe import Bits, Recipe, requested
from vitquant.schema import Integer, ListOf, Number, Plain, Table, TableOf, Text, check
from vitquant.tasks.classification import ClassificationResult
from vitquant.tasks.features import FeaturesResult
from vitquant.tasks.images import batches, fingerprint, load_unlabelled
from vitquant.version import __version__
from vitquant.work import WorkDirectory
from vitquant.workers.jobs import Results, run_jobs
from vitquant.workers.worker import Workers
from vitquant.workflows import quantize, task_for

_LONGEST = 2**20  # bytes of a sweep's file
_BATCH = 32  # images to evaluate at a time
_WORDS = ListOf(Text(), least=1, most=1000)
_MOST = 10_000  # runs
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

_RESULT = Table(
    {"figures": TableOf(Number(), Text(200, least=1))},
    {
        key: Plain()
        for key in (
            "recipe", "bits", "settings", "seed", "recipe_bits", "model", "calibration", "seconds", "engine", "threads",
            "records", "evaluation",
        )
    },
)  # fmt: skip


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
            RecipeError: the file cannot be read, a key does not fit, there is no such recipe, bits or setting, or there
                are more than 10,000 runs.
        """
        try:
            table = parse_toml(read_file(Path(file), _LONGEST, RecipeError), RecipeError)
            check(table, _SCHEMA, RecipeError)
        except RecipeError as error:
            raise RecipeError(f"{file}: {error}") from None
        seeds = tuple(dict.fromkeys(table.get("seeds", [0])))
        grids = [(grid["recipes"], grid.get("bits", [None]), grid.get("settings", [[]])) for grid in table["grid"]]
        if len(seeds) * sum(math.prod(map(len, grid)) for grid in grids) > _MOST:
            raise RecipeError(f"{file}: more than {_MOST:,} runs; leave out some")
        variants = dict.fromkeys(
            Variant(recipe, bits, tuple(settings)) for grid in grids for recipe, bits, settings in product(*grid)
        )
        for each in variants:  # refused before any of them runs
            try:
                requested(each.recipe, each.bits, each.settings)
            except RecipeError as error:
                raise RecipeError(f"{file}: {each}: {error}") from None
        return cls(tuple(variants), seeds)


@dataclass(frozen=True)
class Setup:
    """What all runs of a sweep have in common.

    Arguments:
        request: the model and its calibration images; each run has its own seed.
        evaluation: directories of images to evaluate on, by name.
        calibrations: what every variant is calibrated on in turn, by name; the images of the request alone when empty.
        classes: a file that says which class a folder is, see `tasks.classes_file`.
        task: as for `quantize`.
        memory: as for `quantize`.
        simulated: whether to accept models that do not lower.
    """

    request: Request
    evaluation: Mapping[str, Path]
    calibrations: Mapping[str, Path | Synthetic] = field(default_factory=dict[str, Path | Synthetic])
    classes: Path | None = None
    task: str | None = None
    memory: float = 4.0
    simulated: bool = False

    def identity(self) -> dict[str, Any]:
        """What another sweep in the same directory must have in common, as plain JSON values.

        Raises:
            VitquantError: a file or directory cannot be read.
        """
        request = self.request
        weights = request.weights if request.weights in ("pretrained", "random") else _content(Path(request.weights))
        return {
            "model": [request.model, request.model_arguments],
            "weights": [weights, request.weights_key],
            "evaluation set": {name: _images(folder) for name, folder in self.evaluation.items()},
            "preprocessing": None if request.preprocessing is None else _content(request.preprocessing),
            "classes": None if self.classes is None else _content(self.classes),
            "skip_bad_images": request.skip_bad_images,
            "task": self.task,
            "simulated": self.simulated,
            "versions": {"vitquant": __version__, "torch": torch.__version__},
        }

    @property
    def calibration(self) -> Mapping[str, Path | Synthetic]:
        """What every variant is calibrated on, by name; the only one has no name."""
        return self.calibrations or {"": self.request.calibration}


def _content(file: Path) -> str:
    """The sha256 of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return sha256_of(file)
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error


def _images(folder: Path) -> list[Any]:
    """What tells the images of a directory, and their labels, from others.

    Raises:
        DataError: there are none, or one cannot be read.
    """
    items = load_unlabelled(folder)
    return [fingerprint(items), sha256(json.dumps([each.label for each in items]).encode()).hexdigest()]


@dataclass(frozen=True)
class _Job:
    """One run.

    Arguments:
        setup: what it has in common with others, with its own calibration images.
        variant, recipe, bits, seed: what is computed.
        images: what tells its calibration images from others, as plain JSON values.
        work: where its state is kept.
    """

    setup: Setup
    variant: Variant
    recipe: Recipe
    bits: Bits
    seed: int
    images: Any
    work: Path

    @property
    def key(self) -> str:
        """The name of its result: what is computed, whatever the file of its recipe was called."""
        request = self.setup.request
        images = [self.images, request.images, request.batch]
        text = json.dumps([self.recipe.to_dict(), str(self.bits), self.seed, images], sort_keys=True)
        name = re.sub(r"[^A-Za-z0-9+_-]", "_", self.recipe.name)[:60]
        return f"{name}-{sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Row:
    """The figures of a variant.

    Arguments:
        variant: the recipe, bits and settings.
        calibration: the name of what it was calibrated on; empty where there is one only.
        figures: for each measure its value by seed.
        failures: the errors of the other seeds, one line each.
    """

    variant: Variant
    calibration: str
    figures: Mapping[str, Mapping[int, float]]
    failures: Mapping[int, str]

    def __str__(self) -> str:
        return f"{self.variant}, {self.calibration}" if self.calibration else str(self.variant)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: mean, smallest and largest of each measure too."""
        spread = {
            name: {
                "mean": statistics.mean(values.values()),
                "smallest": min(values.values()),
                "largest": max(values.values()),
                "values": {str(seed): value for seed, value in values.items()},
            }
            for name, values in self.figures.items()
        }
        failures = {str(seed): failure for seed, failure in self.failures.items()}
        about = asdict(self.variant) | {"calibration": self.calibration}
        return {**about, "figures": spread, "failures": failures}


def run_sweep(
    sweep: Sweep,
    setup: Setup,
    directory: str | Path,
    workers: Workers | None = None,
    progress: Progress = silent,
) -> list[Row]:
    """Run every variant on every calibration set with every seed, and gather their figures.

    Images that have to be made are made once for each seed, and kept in the directory.

    Arguments:
        sweep: the variants and seeds.
        setup: the model, its images and what else they have in common.
        directory: keeps the result of every run as it ends, and the state of unfinished ones: a later call with the
            same setup runs only what is missing, so that variants and seeds can be added.
        workers: run as many side by side as they are, and share the memory; None runs one after another.
        progress: called with the number of runs that are done, and of all; while images are made, with that of
            iterations.

    Returns:
        A row for each variant and calibration set, in order.

    Raises:
        CheckpointError: the directory is in use, of another setup, or holds something else; or a result is damaged.
        VitquantError: the model, its weights or images are not what they should be.
    """
    directory = Path(directory).absolute()
    _check(sweep, setup)
    share = setup if workers is None else replace(setup, memory=setup.memory / workers.count)
    progress("reading the images", 0, len(sweep.variants) * len(setup.calibration) * len(sweep.seeds))
    with WorkDirectory.opened(directory, setup.identity()):
        jobs: dict[tuple[Variant, str, int], _Job] = {}
        for name, source in setup.calibration.items():
            images: Any = str(source) if isinstance(source, Synthetic) else _images(source)
            for variant, seed in product(sweep.variants, sweep.seeds):
                folder = _folder(directory, source, setup.request, seed) if isinstance(source, Synthetic) else source
                own = replace(share, request=replace(share.request, calibration=folder, seed=seed))
                recipe, bits = requested(variant.recipe, variant.bits, variant.settings)
                job = _Job(own, variant, recipe, bits, seed, images, directory)
                jobs[variant, name, seed] = replace(job, work=directory / f"{job.key}.work")
        by_key = {job.key: job for job in jobs.values()}
        results = Results(directory, _RESULT, CheckpointError)
        failures: dict[str, VitquantError] = {}
        made: dict[tuple[str, int], VitquantError | None] = {}
        for (_, name, seed), job in jobs.items():
            source = setup.calibration[name]
            if isinstance(source, Synthetic) and results.read(job.key) is None:
                if (name, seed) not in made:
                    made[name, seed] = _make(job.setup, source, seed, progress)
                if (error := made[name, seed]) is not None:
                    failures[job.key] = error

        def forget(key: str, result: dict[str, Any]) -> None:
            shutil.rmtree(by_key[key].work, ignore_errors=True)

        left = {key: job for key, job in by_key.items() if key not in failures}
        found = {**failures, **run_jobs(_run, left, results, workers, progress, forget)}
    return [
        _row(variant, name, {seed: found[jobs[variant, name, seed].key] for seed in sweep.seeds})
        for variant, name in product(sweep.variants, setup.calibration)
    ]


def _folder(directory: Path, how: Synthetic, request: Request, seed: int) -> Path:
    """Where the images are kept that are made for the model with a seed."""
    words = json.dumps([str(how), request.images or USUAL_COUNT, seed])
    return directory / f"{how.method}-{sha256(words.encode()).hexdigest()[:16]}.images"


def _make(setup: Setup, how: Synthetic, seed: int, progress: Progress) -> VitquantError | None:
    """Make the images of a set with a seed, if they are not there; returns why they cannot be made, if so."""
    request = setup.request
    folder = Path(str(request.calibration))
    work = folder.with_suffix(".work")
    if not folder.is_dir():
        named = named_source(request.model, request.weights, request.weights_key, request.model_arguments, seed)
        model = built(named, request.preprocessing, torch.device("cpu"))
        effort = Effort(setup.memory, progress=progress, work=work)
        try:
            images_for(model, how, check_count(request), seed, effort).save(folder)
        except VitquantError as error:
            return error
    shutil.rmtree(work, ignore_errors=True)
    return None


def _check(sweep: Sweep, setup: Setup) -> None:
    """Refuse a model, images and files that no run could use, before the first of them.

    Raises:
        VitquantError: one of them is not what it should be.
    """
    for folder in setup.evaluation.values():
        load_unlabelled(folder)
    if setup.classes is not None:
        _content(setup.classes)
    for source in setup.calibration.values():
        if isinstance(source, Synthetic):
            check_count(setup.request)
        else:
            load_unlabelled(source)
    request = setup.request
    named = named_source(request.model, request.weights, request.weights_key, request.model_arguments, sweep.seeds[0])
    built(named, request.preprocessing, torch.device("cpu"))
    for each, source in product(sweep.variants, setup.calibration.values()):
        recipe, _ = requested(each.recipe, each.bits, each.settings)
        if not isinstance(source, Synthetic):
            CalibrationImages.chosen(source, recipe, request.images, request.batch)


def _run(job: _Job) -> dict[str, Any]:
    """Quantize and evaluate a model: plain JSON values."""
    setup = job.setup
    prepared = prepare(setup.request, job.recipe, torch.device("cpu"))
    started = time.perf_counter()
    model = quantize(
        prepared.network,
        job.recipe,
        prepared.data,
        bits=str(job.bits),
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
    return {
        **asdict(job.variant),
        "seed": job.seed,
        "recipe_bits": str(job.bits),
        "model": digest(model),
        "calibration": model.provenance["calibration"],
        "seconds": seconds,
        "engine": engine,
        "threads": torch.get_num_threads(),
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
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}


def _losses(records: Sequence[Record]) -> dict[str, float]:
    """The losses before and after searches, for those that tell them."""
    return {key: each.summary[key] for each in records for key in ("loss before", "loss after") if key in each.summary}


def _row(variant: Variant, calibration: str, results: Mapping[int, dict[str, Any] | VitquantError]) -> Row:
    done = {seed: each["figures"] for seed, each in results.items() if not isinstance(each, VitquantError)}
    names = dict.fromkeys(name for each in done.values() for name in each)
    figures = {name: {seed: each[name] for seed, each in done.items() if name in each} for name in names}
    return Row(
        variant,
        calibration,
        figures,
        {seed: str(each) for seed, each in results.items() if isinstance(each, VitquantError)},
    )

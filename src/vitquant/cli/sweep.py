"""`vitquant sweep`: one model by several recipes, bits, settings and seeds, and one table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from vitquant.cli import calibrating, options
from vitquant.cli.evaluate import Classes
from vitquant.cli.quantize import Simulated, TaskName
from vitquant.cli.terminal import Terminal
from vitquant.errors import DataError

File = Annotated[
    Path, typer.Argument(metavar="SWEEP.toml", help="What to run: seeds, and grids of recipes, bits and settings.")
]
Data = Annotated[
    list[Path], typer.Option(metavar="DIR", help="Directory of images to evaluate on; repeat for several.")
]
Calibrations = Annotated[
    list[str],
    typer.Option(
        "--calibration",
        metavar="[NAME=]DIR|synthetic",
        help="As of vitquant quantize; repeat, and every recipe is run on each. NAME is what the table says.",
    ),
]
Output = Annotated[
    Path,
    typer.Option(metavar="DIR", help="Keeps the result of every run; the same command goes on where it was stopped."),
]
Workers = Annotated[
    str,
    typer.Option(
        metavar="N|ray", help="Processes that run side by side, or ray: those of a Ray cluster; 0: one run at a time."
    ),
]


def sweep(
    model: calibrating.Name,
    file: File,
    calibration: Calibrations,
    data: Data,
    output: Output,
    weights: calibrating.Weights = "pretrained",
    weights_key: calibrating.WeightsKey = None,
    classes: Classes = None,
    synthesis: calibrating.Synthesis = None,
    images: calibrating.Images = None,
    batch: calibrating.Batch = None,
    preprocessing: options.PreprocessingFile = None,
    model_arguments: calibrating.ModelArguments = None,
    memory_budget: calibrating.MemoryBudget = None,
    task: TaskName = None,
    simulated: Simulated = False,
    workers: Workers = "0",
    skip_bad_images: options.SkipBadImages = False,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Quantize and evaluate MODEL by every recipe, bits, settings and seed of SWEEP.toml, and print one table.

    The exit code is 1 if a recipe refused the model in some runs.
    """
    started = time.perf_counter()
    with Terminal(json, quiet) as terminal:
        with terminal.progress("loading"):
            from vitquant.prepared import Request, Synthetic, calibration_named, takes_no_settings
            from vitquant.report.tables import facts, sweep_table
            from vitquant.sweep import Setup, Sweep, run_sweep
            from vitquant.tasks.task import task_named
            from vitquant.workers.opening import asked_workers, opened

            planned, share = Sweep.read(file), asked_workers(workers)
            if task is not None:
                task_named(task)
            options.choose_device(options.Device.CPU, threads)
            names = [each.name or str(each) for each in data]
            if len(set(names)) < len(names):
                raise DataError(f"--data: {', '.join(names)}: two directories have the same name; rename one")
            given = weights if weights in ("pretrained", "random") else str(Path(weights).absolute())
            steps = _absolute(preprocessing)
            if synthesis and all(takes_no_settings(_named(each)[1]) for each in calibration):
                raise DataError(f"--synthesis {synthesis[0]}: no calibration set has settings; give synthetic as one")
            calibrations: dict[str, Path | Synthetic] = {}
            for name, source in map(_named, calibration):
                if name in calibrations:
                    raise DataError(f"--calibration: two are named {name}; give NAME=DIR")
                made = calibration_named(source, () if takes_no_settings(source) else synthesis or ())
                calibrations[name] = made if isinstance(made, Synthetic) else made.absolute()
            request = Request(
                model, next(iter(calibrations.values())), given, weights_key, images, batch, steps, model_arguments,
                seed=0, image_workers=0, skip_bad_images=skip_bad_images,
            )  # fmt: skip
            setup = Setup(
                request,
                dict(zip(names, (each.absolute() for each in data), strict=True)),
                calibrations if len(calibrations) > 1 else {},
                _absolute(classes),
                task,
                4.0 if memory_budget is None else memory_budget,
                simulated,
            )
        terminal.continuing(output)
        with terminal.progress("runs") as update, opened(share) as side_by_side:

            def show(what: str, done: int, total: int) -> None:
                update(description=what, completed=done, total=total, unit="")

            rows = run_sweep(planned, setup, output, side_by_side, show)
        summary = {
            "model": model,
            "runs": f"{len(planned.variants)} variants, seeds {', '.join(map(str, planned.seeds))}",
            "calibrated on": ", ".join(calibrations),
            "kept in": f"{output}, after {time.perf_counter() - started:.1f} s",
        }
        values = {
            "model": model,
            "seeds": list(planned.seeds),
            "output": str(output.absolute()),
            "rows": [row.to_dict() for row in rows],
        }
        terminal.result(values, sweep_table(rows), facts(summary))
        for row in rows:
            for seed, failure in row.failures.items():
                terminal.failure(f"{row}, seed {seed}: {failure}")
    if any(row.failures for row in rows):
        raise typer.Exit(1)


def _named(word: str) -> tuple[str, str]:
    """A name, and what it is a name of; where none is given, the directory's own, or the word.

    Raises:
        DataError: one of them is empty.
    """
    name, equals, source = word.partition("=")
    if not equals or "/" in name:
        name, source = Path(word).name or word, word
    if not name or not source:
        raise DataError(f"--calibration {word}: give NAME=DIR, or DIR")
    return name, source


def _absolute(path: Path | None) -> Path | None:
    """The path, which workers read in other working directories."""
    return None if path is None else path.absolute()

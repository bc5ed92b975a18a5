"""Mixed precision of VT-PTQ on the real DeiT-Tiny, beside the same bits everywhere.

    python benchmarks/mixed_precision.py BITS... [--recipe vt-ptq] [--by MEASURE...] [--figure FRONT.png]

BITS are targets for the mean bits of attention's and MLP's weights: 8 has candidates 6..10, as published (9 and 10 are
simulated only), 6 has 4..8, and 4 has 2..6, where the paper does not say. Data: ../shared; 32 calibration photographs,
the official runs' list, and both evaluation sets, which nothing is chosen by. Everything that is no module's,
patch embedding and head, has BITS, too. For each target prints what the sensitivity is at the same bits everywhere and
mixed, and what that makes of the accuracy, by nuclear norm and by output error. Minutes a row.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from real_deit import EVALUATION, PREPROCESSING, SCORES, SHARED, evaluation_sets, float_deit, row, run, score_cells
from rich.console import Console
from runs import Found, add_options, runs_of

import vitquant
from vitquant.allocation.front import pareto_front
from vitquant.allocation.table import MEASURES
from vitquant.engines import default_engine
from vitquant.files import write_file
from vitquant.report.figures import front_figure
from vitquant.tasks.images import batches, load_listing, subset

CANDIDATES = {8: range(6, 11), 6: range(4, 9), 4: range(2, 7)}
console = Console(stderr=True)


@dataclass(frozen=True)
class Job:
    """One run: a recipe, the target of its mean bits, the measures to allocate by, and where to draw a front."""

    recipe: str
    target: int
    by: tuple[str, ...]
    figure: Path | None


def main() -> None:
    """Measure, allocate, quantize, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", type=int, choices=CANDIDATES)
    parser.add_argument("--recipe", default="vt-ptq")
    parser.add_argument("--by", nargs="+", default=["nuclear-norm", "output-error"], choices=MEASURES)
    parser.add_argument("--figure", type=Path, help="where to draw the front of the last target")
    add_options(parser)
    given = parser.parse_args()
    targets = list(dict.fromkeys(given.targets))
    figures = {targets[-1]: given.figure}
    jobs = [Job(given.recipe, target, tuple(given.by), figures.get(target)) for target in targets]
    found = runs_of(_measure, jobs, given)
    columns = (
        "recipe", "runs in", "by", "mean bits", "MB", "sensitivity", "the same bits everywhere",
        *[f"{measure}, {name}" for name in EVALUATION for measure in SCORES],
    )  # fmt: skip
    print(row(columns))
    print("|---" * len(columns) + "|")
    for job in jobs:
        for by in job.by:
            each = found[job][by]
            cells = [f"{job.recipe} w{job.target}a{job.target}", each["runs in"], by, f"{each['mean bits']:.3f}"]
            cells += [f"{each['megabytes']:.2f}", f"{each['sensitivity']:.4g}", f"{each['uniform sensitivity']:.4g}"]
            print(row([*cells, *(cell for name in EVALUATION for cell in score_cells([each[name]]))]))
            console.print(" ".join(f"{name}={width}" for name, width in each["bits"].items()))


def _measure(job: Job) -> Found:
    listing = subset(load_listing(SHARED / "images" / "photos_calibration"), 32, 0)
    calibration = batches(listing, PREPROCESSING, 32)
    bits, candidates = f"w{job.target}a{job.target}", CANDIDATES[job.target]
    table = vitquant.sensitivity(float_deit(), job.recipe, calibration, bits=bits, candidates=candidates)
    costs, sizes = table.mean_bits(), table.megabytes()
    found: Found = {}
    for by in job.by:
        recipe, chosen = table.allocate(mean_bits=job.target, by=by)
        uniform = table.uniform(by, costs)
        runs_in, engine, _ = default_engine(vitquant.quantize(float_deit(), recipe, calibration))
        found[by] = {
            "runs in": runs_in,
            "mean bits": costs.total(chosen.cost),
            "megabytes": sizes.total(sum(sizes.of[name][width] for name, width in chosen.bits.items())),
            "sensitivity": chosen.sensitivity,
            "uniform sensitivity": uniform[job.target][1],
            "bits": dict(chosen.bits),
            **{name: each.scores(run(engine, each.images)) for name, each in evaluation_sets().items()},
        }
        if job.figure is not None and by == job.by[0]:
            front = pareto_front(table.choices(by, costs))
            write_file(job.figure, front_figure(front, uniform, chosen, costs, f"sensitivity, {by}"), force=True)
    return found


if __name__ == "__main__":
    from mixed_precision import main  # see runs.py

    main()

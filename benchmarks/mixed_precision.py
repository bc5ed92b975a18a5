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
from pathlib import Path

from real_deit import EVALUATION, PREPROCESSING, SCORES, SHARED, EvaluationSet, float_deit, row, run
from rich.console import Console

import vitquant
from vitquant.allocation.front import pareto_front
from vitquant.allocation.table import MEASURES
from vitquant.engines import default_engine
from vitquant.report.figures import front_figure
from vitquant.tasks.images import batches, load_listing, subset

CANDIDATES = {8: range(6, 11), 6: range(4, 9), 4: range(2, 7)}
console = Console(stderr=True)


def main() -> None:
    """Measure, allocate, quantize, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", type=int, choices=CANDIDATES)
    parser.add_argument("--recipe", default="vt-ptq")
    parser.add_argument("--by", nargs="+", default=["nuclear-norm", "output-error"], choices=MEASURES)
    parser.add_argument("--figure", type=Path, help="where to draw the front of the last target")
    arguments = parser.parse_args()
    model = float_deit()
    sets = [EvaluationSet.of(model, name) for name in EVALUATION]
    listing = subset(load_listing(SHARED / "images" / "photos_calibration"), 32, 0)
    calibration = batches(listing, PREPROCESSING, 32)
    columns = (
        "recipe", "runs in", "by", "mean bits", "MB", "sensitivity", "the same bits everywhere",
        *[f"{measure}, {name}" for name in EVALUATION for measure in SCORES],
    )  # fmt: skip
    print(row(columns))
    print("|---" * len(columns) + "|")
    for target in arguments.targets:
        bits = f"w{target}a{target}"
        with console.status(f"{bits}: measuring"):
            table = vitquant.sensitivity(model, arguments.recipe, calibration, bits=bits, candidates=CANDIDATES[target])
        for by in arguments.by:
            costs, sizes = table.mean_bits(), table.megabytes()
            recipe, chosen = table.allocate(mean_bits=target, by=by)
            uniform = table.uniform(by, costs)
            with console.status(f"{bits}, mixed by {by}"):
                quantized = vitquant.quantize(model, recipe, calibration)
                runs_in, engine, _ = default_engine(quantized)
                measured = [cell for each in sets for cell in each.cells([run(engine, each.images)])]
            size = sizes.total(sum(sizes.of[name][width] for name, width in chosen.bits.items()))
            cells = (
                f"{arguments.recipe} {bits}",
                runs_in,
                by,
                f"{costs.total(chosen.cost):.3f}",
                f"{size:.2f}",
                f"{chosen.sensitivity:.4g}",
                f"{uniform[target][1]:.4g}",
                *measured,
            )
            print(row(cells), flush=True)
            console.print(" ".join(f"{name}={width}" for name, width in chosen.bits.items()))
            if arguments.figure is not None and by == arguments.by[0]:
                front = pareto_front(table.choices(by, costs))
                drawn = front_figure(front, uniform, chosen, costs, f"sensitivity, {by}")
                arguments.figure.write_bytes(drawn)


if __name__ == "__main__":
    main()

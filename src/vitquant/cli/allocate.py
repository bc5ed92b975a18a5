"""`vitquant allocate`: a mixed-precision recipe from measured sensitivities."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from vitquant.cli import options
from vitquant.cli.completing import measures
from vitquant.cli.terminal import Terminal
from vitquant.errors import AllocationError


def allocate(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="The sensitivity.json of `vitquant sensitivity`.")],
    output: Annotated[Path, typer.Option(metavar="RECIPE.toml", help="The recipe to write.")],
    mean_bits: Annotated[
        float | None,
        typer.Option(
            callback=options.finite, help="Maximum mean bits of the weights of attention and MLP, as in 6 or 5.5."
        ),
    ] = None,
    megabytes: Annotated[
        float | None,
        typer.Option(callback=options.finite, help="Maximum size of the saved model, instead of mean bits."),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            metavar="MEASURE",
            autocompletion=measures,
            help="The measure to minimize: nuclear-norm, output-error or correlation.",
        ),
    ] = "nuclear-norm",
    figure: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the Pareto front.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Give every module the bits with which the model loses least at a size, and write that as a recipe."""
    with Terminal(json, quiet) as terminal:
        from vitquant.allocation.front import pareto_front
        from vitquant.allocation.table import SensitivityTable
        from vitquant.files import recover, write_file
        from vitquant.report.figures import check_matplotlib, front_figure
        from vitquant.report.tables import allocation_table, facts

        if output.suffix != ".toml":
            raise AllocationError(f"{output}: the name of a recipe's file ends in .toml")
        if figure is not None:
            check_matplotlib()
            if figure.suffix != ".png":
                raise AllocationError(f"{figure}: the name of a figure's file ends in .png")
        recover(table)
        with ExitStack() as held:
            # The old figure is removed before the recipe is replaced: a new recipe is never beside an old figure.
            drawn = None if figure is None else held.enter_context(terminal.replacing(figure, force))
            written = held.enter_context(terminal.replacing(output, force))
            measured = SensitivityTable.from_json(table)
            recipe, chosen = measured.allocate(mean_bits=mean_bits, megabytes=megabytes, by=by)
            costs = measured.mean_bits() if megabytes is None else measured.megabytes()
            front = pareto_front(measured.choices(by, costs))
            uniform = measured.uniform(by, costs)
            write_file(written, recipe.to_toml().encode())
            if figure is not None and drawn is not None:
                write_file(drawn, front_figure(front, uniform, chosen, costs, f"sensitivity, {by}"))
                Path(os.path.realpath(figure)).unlink(missing_ok=True)
        rows = {
            "recipe": f"{recipe.name}; everything else at {measured.bits}",
            "costs": f"{costs.total(chosen.cost):.4g} {costs.unit}",
            "sensitivity": f"{chosen.sensitivity:.4g} ({by}); "
            + ", ".join(f"{bits} bits everywhere {lost:.4g}" for bits, (_, lost) in sorted(uniform.items())),
            "front": f"{len(front)} allocations that no other beats",
            "written to": ", ".join(str(path) for path in (output, figure) if path is not None),
        }
        values = {
            "output": str(output.absolute()),
            "figure": None if figure is None else str(figure.absolute()),
            "recipe": recipe.name,
            "by": by,
            "unit": costs.unit,
            "cost": costs.total(chosen.cost),
            "sensitivity": chosen.sensitivity,
            "bits": dict(chosen.bits),
            "uniform": {bits: {"cost": costs.total(c), "sensitivity": s} for bits, (c, s) in uniform.items()},
            "front": [{"cost": costs.total(each.cost), "sensitivity": each.sensitivity} for each in front],
        }
        terminal.result(values, allocation_table(chosen.bits), facts(rows))

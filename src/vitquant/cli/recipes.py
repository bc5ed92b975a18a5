"""`vitquant recipes`: what recipes there are."""

from __future__ import annotations

from vitquant.cli import options
from vitquant.cli.terminal import Terminal


def recipes(json: options.Json = False, quiet: options.Quiet = False, debug: options.Debug = False) -> None:
    """List the recipes: name, paper, bits, cost, expected accuracy."""
    with Terminal(json, quiet) as terminal:
        from vitquant.recipe import available
        from vitquant.report.tables import recipes_table

        found = available()
        values = [
            {
                "name": recipe.name,
                "title": recipe.title,
                "paper": recipe.source,
                "bits": str(recipe.bits),
                "cost": recipe.cost,
                "passes": recipe.passes,
                "expected": recipe.expected,
            }
            for recipe in found
        ]
        terminal.result({"recipes": values}, recipes_table(found))

"""`vitquant recipes`: the list of recipes."""

from __future__ import annotations

from dataclasses import asdict

from vitquant.cli import options
from vitquant.cli.terminal import Terminal


def recipes(json: options.Json = False, quiet: options.Quiet = False, debug: options.Debug = False) -> None:
    """List the recipes: name, paper, bits, cost, expected accuracy; and what is taken when none is named."""
    with Terminal(json, quiet) as terminal:
        from vitquant.recipe import CHOICES, available
        from vitquant.report.tables import choices_table, recipes_table

        found = available()
        values = [
            {
                "name": recipe.name,
                "title": recipe.title,
                "paper": recipe.source,
                "bits": str(recipe.bits),
                "cost": recipe.cost,
                "relative_cost": recipe.relative_cost,
                "expected": recipe.expected,
            }
            for recipe in found
        ]
        choices = [asdict(choice) for choice in CHOICES]
        terminal.result({"default": choices, "recipes": values}, recipes_table(found), choices_table(CHOICES))

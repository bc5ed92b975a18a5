"""A recipe whose modules have bits of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vitquant.recipe import Recipe
from vitquant.recipe.rule import Rule


def mixed_recipe(recipe: Recipe, rules: Mapping[str, Mapping[str, Sequence[str]]], bits: Mapping[str, int]) -> Recipe:
    """The recipe with each module's weights and activations at its bits; all else is as it was.

    Behind every rule that decides about modules stand copies of it, one for each bit width, which say the modules.

    Arguments:
        recipe: whose rules have symbols for these bits.
        rules: for each module the rules that decide about it, and their sites there.
        bits: of each module.

    Raises:
        RecipeError: a bit width that a rule's scheme does not have.
    """
    grown: list[Rule] = []
    for rule in recipe.rules:
        grown.append(rule)
        for width in sorted(set(bits.values())):
            sites: list[str] = []
            for module, decided in rules.items():
                if bits.get(module) == width and rule.name in decided:
                    sites += [f"{module}.*"] if rule.site == ("*",) else decided[rule.name]
            if sites:
                assert rule.spec is not None
                name, spec = f"{rule.name}-{width}-bits", replace(rule.spec, bits=width)
                grown.append(replace(rule, name=name, site=tuple(sites), spec=spec, optional=False))
    return replace(recipe, rules=tuple(grown))

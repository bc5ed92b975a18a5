"""A mixed-precision recipe, in which each module has its own bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vitquant.recipe import Recipe
from vitquant.recipe.rule import Rule


def mixed_recipe(recipe: Recipe, values: Mapping[str, Mapping[str, Sequence[str]]], bits: Mapping[str, int]) -> Recipe:
    """The recipe with each module's weights and activations at the module's bits, and everything else unchanged.

    Every rule that applies to modules is followed by copies of it, one for each bit width, which name the values.

    Arguments:
        recipe: its rules have symbols for these bits.
        values: for each module the names of its values, by the name of the rule that decides about them.
        bits: of each module.

    Raises:
        RecipeError: a rule's scheme does not support a bit width.

    Pitfall: a later `--set` of a rule does not change its copies; change the recipe before it is measured.
    """
    grown: list[Rule] = []
    for rule in recipe.rules:
        grown.append(rule)
        for width in sorted(set(bits.values())):
            names = tuple(
                name
                for module, decided in values.items()
                if bits[module] == width
                for name in decided.get(rule.name, ())
            )
            if names:
                assert rule.spec is not None
                named = replace(rule, name=f"{rule.name}-{width}-bits", site=("*",), kind=(), operand=(), value=names)
                grown.append(replace(named, spec=replace(rule.spec, bits=width), optional=False))
    return replace(recipe, rules=tuple(grown))

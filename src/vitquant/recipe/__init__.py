"""Recipes, which say as data how each operand is quantized: reading, overlays, settings, matching with a model."""

from vitquant.recipe.bits import Bits
from vitquant.recipe.library import available, load_recipe
from vitquant.recipe.matching import Assignment, assign
from vitquant.recipe.override import override
from vitquant.recipe.recipe import Method, Recipe
from vitquant.recipe.request import CHOICES, DEFAULT, Choice, requested

__all__ = [
    "CHOICES", "DEFAULT", "Assignment", "Bits", "Choice", "Method", "Recipe", "assign", "available", "load_recipe",
    "override", "requested",
]  # fmt: skip

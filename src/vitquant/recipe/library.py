"""Find recipes: those that ship with vitquant, by name, and the user's own, by path."""

from __future__ import annotations

import os
from functools import reduce
from importlib.resources import files
from pathlib import Path

from vitquant.errors import RecipeError
from vitquant.parsing import parse_toml, read_file
from vitquant.recipe.recipe import LONGEST, Overlay, Recipe
from vitquant.recipe.tables import within
from vitquant.schema import nearest

_SHIPPED = files("vitquant") / "recipes"


def available() -> list[Recipe]:
    """The recipes that ship with vitquant, sorted by file name, without overlays."""
    texts = {name: (_SHIPPED / f"{name}.toml").read_text(encoding="utf-8") for name in _names()}
    return [
        Recipe.from_toml(text, name) for name, text in texts.items() if "overlay" not in parse_toml(text, RecipeError)
    ]


def load_recipe(text: str) -> Recipe:
    """Read a recipe, with overlays laid over it in the order written.

    Arguments:
        text: `fq-vit`, `path/to/file.toml`, or several joined by `+`: `vt-ptq+integer-residual`. A part with a
            slash or with the ending `.toml` is a path. A path that contains `+` cannot be joined with others.

    Raises:
        RecipeError: it is not found or not valid.
    """
    base, *overlays = [text] if os.path.isfile(text) else text.split("+")
    recipe = Recipe.from_toml(_read(base), base)
    return reduce(overlaid, overlays, recipe)


def overlaid(recipe: Recipe, overlay: str) -> Recipe:
    """A recipe with one overlay laid over it.

    Arguments:
        overlay: its name or path, as in `load_recipe`.

    Raises:
        RecipeError: it is not found, not valid, or does not fit the recipe.
    """
    return Overlay.from_toml(_read(overlay), overlay).over(recipe)


def _names() -> list[str]:
    return sorted(Path(f.name).stem for f in _SHIPPED.iterdir() if f.name.endswith(".toml"))


def _read(part: str) -> bytes | str:
    if "/" in part or "\\" in part or part.endswith(".toml"):
        with within(part):
            return read_file(Path(part), LONGEST, RecipeError)
    if part not in _names():
        raise RecipeError(f"no recipe {part!r} (a file's name ends in .toml); {nearest(part, _names())}")
    return (_SHIPPED / f"{part}.toml").read_text(encoding="utf-8")

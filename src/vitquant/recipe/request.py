"""What a caller asks for, as a recipe and its bits; the best recipe at these bits where none is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitquant.errors import RecipeError
from vitquant.recipe.bits import Bits
from vitquant.recipe.library import load_recipe
from vitquant.recipe.override import override
from vitquant.recipe.recipe import Recipe

DEFAULT = "default"


@dataclass(frozen=True)
class Choice:
    """The recipe with the highest agreement at some bits, among those whose every operation lowers to integers.

    Arguments:
        least: activations have as many bits at least.
        recipe: with its overlays.
        probs: bits of the attention probabilities where the caller gives none.
        settings: as for `override`.

    Source: measured on held-out calibration photographs, docs/default-recipe.md.
    """

    least: int
    recipe: str
    probs: int
    settings: tuple[str, ...] = ()


CHOICES = (
    Choice(6, "repq-vit+fully-integer+wide-residual", probs=5),
    Choice(2, "repq-vit+searched-scales+fully-integer+wide-residual", probs=4),
)
_MOST_BITS = 8  # of weights and activations in an integer product


def requested(recipe: str | Recipe, bits: str | None, settings: Sequence[str] = ()) -> tuple[Recipe, Bits]:
    """The recipe and the bits that a caller asks for.

    Arguments:
        recipe: what `load_recipe` reads, or a recipe. `default` is the best that lowers to integers at these bits,
            and overlays can be laid over it, as in `default+mine.toml`.
        bits: as `Bits.parse` reads them; the recipe's own, for `default` "w8a8", when None.
        settings: see `override`.

    Raises:
        RecipeError: see `load_recipe`, `Bits.parse` and `override`; or `default` with more bits than integers have.
    """
    if isinstance(recipe, Recipe) or recipe.split("+")[0] != DEFAULT:
        chosen = override(recipe if isinstance(recipe, Recipe) else load_recipe(recipe), settings)
        return chosen, chosen.bits if bits is None else Bits.parse(bits)
    widths = Bits.parse("w8a8" if bits is None else bits)
    if max(widths.weights, widths.activations) > _MOST_BITS:
        raise RecipeError(
            f"{widths}: {DEFAULT} runs in integers, which have {_MOST_BITS} bits at most; give fewer, or name a recipe"
        )
    choice = next(each for each in CHOICES if each.least <= widths.activations)
    if "s" not in (bits or "").lower():
        widths = Bits(widths.weights, widths.activations, choice.probs, widths.residual)
    chosen = load_recipe("+".join([choice.recipe, *recipe.split("+")[1:]]))
    return override(chosen, [*choice.settings, *settings]), widths

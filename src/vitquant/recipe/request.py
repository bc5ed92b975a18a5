"""The recipe and bits that a caller asks for; where none is named, the best recipe at these bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vitquant.errors import RecipeError
from vitquant.recipe.bits import Bits
from vitquant.recipe.library import load_recipe
from vitquant.recipe.override import Settings, override
from vitquant.recipe.recipe import Recipe

DEFAULT = "default"


@dataclass(frozen=True)
class Choice:
    """The recipe with the highest agreement at some bits, among those whose every operation lowers to integers.

    Arguments:
        weights, activations: the fewest bits of weights and activations for which it is chosen.
        recipe: the recipe's name, with overlays.
        probs: the bits of the attention probabilities if the caller gives none.
        least_probs: the fewest bits of the attention probabilities for which it is chosen.
        settings: as for `override`.

    Source: measured on held-out calibration photographs, docs/default-recipe.md.
    """

    weights: int
    activations: int
    recipe: str
    probs: int
    least_probs: int = 2
    settings: tuple[str, ...] = ()


_NARROW = "repq-vit+twin-steps+reconstructed-output+fully-integer+wide-residual"
_MORE_IMAGES = ("calibration.images=512",)
CHOICES = (
    Choice(
        7,
        7,
        "repq-vit+fully-integer+wide-residual+uniform-probs",
        probs=8,
        least_probs=7,
        settings=("activations.observer=omse", "weights.observer=omse", "uniform-probs.observer=best-percentile"),
    ),
    Choice(7, 7, "repq-vit+fully-integer+wide-residual", probs=5),
    Choice(2, 7, "repq-vit+reconstructed-output+fully-integer+wide-residual", probs=5, settings=_MORE_IMAGES),
    Choice(2, 6, _NARROW, probs=5, settings=_MORE_IMAGES),
    Choice(2, 2, _NARROW, probs=4, settings=_MORE_IMAGES),
)
_MOST_BITS = 8  # of weights and activations in an integer product


def requested(recipe: str | Recipe, bits: str | None, settings: Settings = ()) -> tuple[Recipe, Bits]:
    """The recipe and the bits that a caller asks for.

    Arguments:
        recipe: what `load_recipe` reads, or a recipe. `default` is the best that lowers to integers at these bits,
            and overlays can be laid over it, as in `default+mine.toml`.
        bits: as `Bits.parse` reads them; the recipe's own, for `default` "w8a8", when None.
        settings: see `override`.

    Raises:
        RecipeError: see `load_recipe`, `Bits.parse` and `override`; `default` with more bits than integer products
            support; or bits `r` that no rule of the recipe uses for the residual stream.
    """
    if not isinstance(recipe, Recipe | str) or not isinstance(bits, str | None):
        raise RecipeError(f"recipe {recipe!r}, bits {bits!r}: give a name or a Recipe, and bits such as 'w8a8'")
    if isinstance(recipe, Recipe) or recipe.split("+")[0] != DEFAULT:
        chosen = override(recipe if isinstance(recipe, Recipe) else load_recipe(recipe), settings)
        widths = chosen.bits if bits is None else Bits.parse(bits)
        _refuse_other_stream(chosen, widths)
        return chosen, widths
    widths = Bits.parse("w8a8" if bits is None else bits)
    if max(widths.weights, widths.activations) > _MOST_BITS:
        raise RecipeError(
            f"{widths}: {DEFAULT} runs in integers, which have {_MOST_BITS} bits at most; give fewer, or name a recipe"
        )
    probs = widths.probs if "s" in (bits or "").lower() else None
    choice = next(
        each
        for each in CHOICES
        if each.weights <= widths.weights
        and each.activations <= widths.activations
        and each.least_probs <= (probs or each.probs)
    )
    widths = replace(widths, probs=probs or choice.probs)
    chosen = load_recipe("+".join([choice.recipe, *recipe.split("+")[1:]]))
    chosen = override(override(chosen, choice.settings), settings)
    _refuse_other_stream(chosen, widths)
    return chosen, widths


def _refuse_other_stream(recipe: Recipe, bits: Bits) -> None:
    """Refuse bits `r` without effect: no rule uses them, or a later rule sets other bits for the whole stream."""
    if bits.residual == Bits().residual:
        return
    specs = {rule.name: rule.spec for rule in recipe.rules if rule.spec is not None}
    if all(spec.bits != "r" for spec in specs.values()):
        raise RecipeError(
            f"{bits}: r is the bits of the residual stream, and no rule of {recipe.name} gives them: leave r out"
        )
    streams = [rule.name for rule in recipe.rules if "residual" in rule.kind and rule.site == ("*",) and not rule.value]
    name = streams[-1] if streams else ""
    if name in specs and specs[name].bits != "r":
        raise RecipeError(
            f"{bits}: r is the bits of the residual stream, and rule {name!r} gives it {specs[name].bits!r}: "
            f"leave r out, or give --set {name}.bits=NUMBER"
        )

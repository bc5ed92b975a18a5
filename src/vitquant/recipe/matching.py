"""Match the rules of a recipe with the values of a model: how each value is quantized, and by which rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from vitquant.errors import RecipeError
from vitquant.graph.kinds import KINDS, kinds_that
from vitquant.graph.sites import Reader, Value
from vitquant.recipe.bits import Bits
from vitquant.recipe.recipe import Recipe
from vitquant.recipe.rule import Rule
from vitquant.recipe.tables import within
from vitquant.spec import PerHead, QuantSpec


@dataclass(frozen=True)
class Assignment:
    """How one value is quantized.

    Arguments:
        spec: the spec of its quantizer; None when it stays in float.
        observer: the name of the observer that calibrates it; None when it stays in float.
        rule: the name of the rule that decided; empty when no rule matched.
    """

    spec: QuantSpec | None
    observer: str | None
    rule: str


def assign(recipe: Recipe, bits: Bits, values: Sequence[Value]) -> dict[str, Assignment]:
    """Give every value the spec of the last rule that matches one of its readers, keyed by `Value.name`.

    A value has one quantizer, so the rule that wins decides for all of its readers: a rule for
    LayerNorm inputs also sets the residual stream that a LayerNorm reads.

    Arguments:
        recipe: its rules go from general to special.
        bits: the widths for the symbols in the rules (`recipe.bits`, or those that the user asked for).
        values: of the model.

    Raises:
        RecipeError: a rule that is not optional matches nothing, or a rule names a value that the model does not have;
            two overlays set the same value and the later does not say `override = true`; the bits do not fit a rule's
            scheme; or a rule asks for a scale per head of a value without an axis of heads.
    """
    matches = {rule.name: [rule.matches(value) for value in values] for rule in recipe.rules}
    known = {str(reader) for value in values for reader in value.readers}
    for rule in recipe.rules:
        if missing := [name for name in rule.value if name not in known]:
            raise RecipeError(f"rule {rule.name!r} names {missing[0]}, which this model does not have")
    if idle := [rule for rule in recipe.rules if not rule.optional and not any(matches[rule.name])]:
        readers = [reader for value in values for reader in value.readers]
        others = f" (nor does {_any_of(repr(rule.name) for rule in idle[1:])})" if len(idle) > 1 else ""
        raise RecipeError(
            f"rule {idle[0].name!r} matches nothing in this model{others}: {_why(idle[0], readers)}; "
            f"if the model is to do without, {_made_optional(idle)}"
        )
    return {
        value.name: _assignment([rule for rule in recipe.rules if matches[rule.name][i]], bits, value)
        for i, value in enumerate(values)
    }


def _assignment(rules: Sequence[Rule], bits: Bits, value: Value) -> Assignment:
    if not rules:
        return Assignment(None, None, "")
    *earlier, winner = rules
    for rule in earlier:
        if rule.overlay and rule.overlay != winner.overlay and not winner.override:
            raise RecipeError(
                f"{value.name}: rule {winner.name!r} of overlay {winner.overlay!r} sets what rule {rule.name!r} of "
                f"overlay {rule.overlay!r} sets; {_remedy(rule, winner)}"
            )
    if winner.spec is None:
        return Assignment(None, None, winner.name)
    with within(f"rule {winner.name!r} at {value.name} with bits {bits}"):
        spec = winner.spec.resolve(bits, value.channel_axis)
        if isinstance(spec.granularity, PerHead) and not _has_heads(value):
            sizes = ", ".join("batch" if size < 0 else str(size) for size in value.shape)
            raise RecipeError(
                f'per = "head" needs attention\'s heads as third axis from the end, and this is ({sizes})'
            )
        return Assignment(spec, winner.observer, winner.name)


def _remedy(earlier: Rule, later: Rule) -> str:
    """What the user can do where two overlays set one value and the later does not say `override = true`."""
    if earlier.override:
        return f"write the overlays in the other order: +{later.overlay}+{earlier.overlay}"
    return f"leave one of the overlays out, or add override = true to {later.name!r} in an overlay of your own"


def _has_heads(value: Value) -> bool:
    """Whether attention reads the value with its heads on axis -3."""
    in_attention = any(KINDS[r.kind].of_attention or r.kind == "softmax" for r in value.readers)
    return in_attention and len(value.shape) > 3 and value.shape[-3] > 0


def _why(rule: Rule, readers: Sequence[Reader]) -> str:
    """Why a rule matches no reader: the first of site, kind and operand that excludes all, and what the model has."""
    named = [r for r in readers if rule.reads_name(r)]
    if not named:
        names = {r.site for r in readers} | {r.module for r in readers}
        near = sorted({n for glob in rule.site for n in get_close_matches(glob, names, n=3, cutoff=0.4)})
        hint = f"near: {', '.join(near)}" if near else f"such as {', '.join(sorted(names)[:3])}"
        return f"no site or module is called {_any_of(rule.site)} ({hint})"
    of_kind = [r for r in named if not rule.kind or r.kind in rule.kind]
    where = "" if rule.site == ("*",) else f" at {_any_of(rule.site)}"
    kinds = Counter(kind for _, kind in {(r.site, r.kind) for r in named})
    there = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    if not of_kind:
        what = _any_of(rule.kind)
    else:
        what = f"operand {_any_of(rule.operand)}{f' of {_any_of(rule.kind)}' if rule.kind else ''}"
        there = f"operands {', '.join(sorted({r.operand for r in of_kind}))}; sites {there}"
    asked = rule.kind if not of_kind else rule.operand
    if set(asked) <= _OF_ATTENTION and not any(r.kind in _OF_ATTENTION for r in readers):
        what += f"{where}, for no attention is found, a softmax between two products of matrices"
    else:
        what += where
    return f"no {what} (there: {there})"


# Kinds and operands that only attention has.
_ATTENTION = kinds_that(of_attention=True)
_OF_ATTENTION = {*_ATTENTION, *(operand for kind in _ATTENTION for operand in KINDS[kind].operands)}


def _made_optional(rules: Sequence[Rule]) -> str:
    """The settings that make rules optional, for the command line and for Python; they work for any recipe."""
    settings = [f"{rule.name}.optional=true" for rule in rules]
    return f"give {' '.join(f'--set {each}' for each in settings)} (settings={settings})"


def _any_of(words: Iterable[str]) -> str:
    return " or ".join(words)

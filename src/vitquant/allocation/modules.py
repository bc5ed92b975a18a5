"""The parts of a model that get bits of their own: the attention and the MLP of every block."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vitquant.graph.kinds import KINDS
from vitquant.graph.sites import Site
from vitquant.model import QuantizedModel
from vitquant.recipe import Bits
from vitquant.recipe.rule import Rule

_PARTS = ("attn", "mlp")


@dataclass(frozen=True)
class Module:
    """One part, whose weights and activations share a bit width.

    Arguments:
        name: `blocks.0.attn`, which the names of its sites begin with.
        values: for each rule of the recipe that decides about them, the names of the values that get its bits.
        weights: the state-dict keys of its weights, and how many numbers each has.
        output: what is compared with float, `softmax:input` or the last layer: the scaled scores of attention, or what
            an MLP computes.
    """

    name: str
    values: dict[str, tuple[str, ...]]
    weights: dict[str, int]
    output: str


def follows(rule: Rule, bits: Bits) -> bool:
    """Whether what a rule quantizes has the bits of its module: those of weights and of activations.

    Attention probabilities have them where they follow the activations; a number in a rule stays as it is.
    """
    symbol = None if rule.spec is None else rule.spec.bits
    return symbol in ("w", "a") or (symbol == "s" and bits.probs == bits.activations)


def find_modules(model: QuantizedModel) -> tuple[Module, ...]:
    """The modules of every block that have quantized weights, in graph order.

    A value that something outside of the module reads too, such as the residual stream, is none of its; nor is an
    operation that is neither attention nor MLP, such as a convolution between them.
    """
    rules = {rule.name: rule for rule in model.recipe.rules}
    members: dict[str, list[Site]] = {}
    for site in model.sites:
        for part in _PARTS:
            if site.name.startswith(f"blocks.{site.block}.{part}."):  # others have their library's names
                members.setdefault(f"blocks.{site.block}.{part}", []).append(site)
    found = []
    for name, sites in members.items():
        inside = {site.name for site in sites}
        values: dict[str, list[str]] = {}
        weights: dict[str, int] = {}
        for value in model.values:
            assignment = model.assignments[value.name]
            if assignment.spec is None or not {reader.site for reader in value.readers} <= inside:
                continue
            if not follows(rules[assignment.rule], model.bits):
                continue
            values.setdefault(assignment.rule, []).append(value.name)
            if value.parameter is not None and value.readers[0].operand == "weight":
                weights[value.parameter] = math.prod(value.shape)
        if weights:
            maps = [f"{site.name}:input" for site in sites if site.kind == "softmax"]
            output = maps[0] if maps else next(site.name for site in reversed(sites) if KINDS[site.kind].layer)
            found.append(Module(name, {rule: tuple(names) for rule, names in values.items()}, weights, output))
    return tuple(found)

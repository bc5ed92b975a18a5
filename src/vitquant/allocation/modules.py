"""The parts of a model that get bits of their own: the attention and the MLP of every block."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vitquant.model import QuantizedModel
from vitquant.packing import packed_size
from vitquant.recipe import Bits
from vitquant.recipe.rule import Rule
from vitquant.sites import Site

_LAYERS = ("linear", "conv")


@dataclass(frozen=True)
class Module:
    """One part, whose weights and activations share a bit width.

    Arguments:
        name: `blocks.0.attn`, which the names of its sites begin with.
        values: the names of the values that get its bits.
        rules: for each rule of the recipe that decides about them, their sites.
        weights: how many numbers each of its weights has.
        output: what is compared with float, `softmax:input` or the last layer: the scaled scores of attention, or what
            an MLP computes.
    """

    name: str
    values: tuple[str, ...]
    rules: dict[str, tuple[str, ...]]
    weights: tuple[int, ...]
    output: str

    def bytes(self, bits: int) -> int:
        """What its weights take, packed."""
        return sum(packed_size(count, bits) for count in self.weights)


def follows(rule: Rule, bits: Bits) -> bool:
    """Whether what a rule quantizes has the bits of its module: those of weights and of activations.

    Attention probabilities have them where they follow the activations; a number in a rule stays as it is.
    """
    symbol = None if rule.spec is None else rule.spec.bits
    return symbol in ("w", "a") or (symbol == "s" and bits.probs == bits.activations)


def find_modules(model: QuantizedModel) -> tuple[Module, ...]:
    """The modules of every block that have quantized weights, in graph order.

    A value that something outside of the module reads too, such as the residual stream, is none of its.
    """
    rules = {rule.name: rule for rule in model.recipe.rules}
    members: dict[str, list[Site]] = {}
    for site in model.sites:
        parts = site.name.split(".")
        if site.block is not None and len(parts) > 3:
            members.setdefault(".".join(parts[:3]), []).append(site)
    found = []
    for name, sites in members.items():
        inside = {site.name for site in sites}
        values: list[str] = []
        weights: list[int] = []
        by_rule: dict[str, list[str]] = {}
        for value in model.values:
            assignment = model.assignments[value.name]
            if assignment.spec is None or not {reader.site for reader in value.readers} <= inside:
                continue
            if not follows(rules[assignment.rule], model.bits):
                continue
            values.append(value.name)
            by_rule.setdefault(assignment.rule, []).append(value.readers[0].site)
            if value.parameter is not None and value.readers[0].operand == "weight":
                weights.append(math.prod(value.shape))
        if weights:
            maps = [f"{site.name}:input" for site in sites if site.kind == "softmax"]
            output = maps[0] if maps else next(site.name for site in reversed(sites) if site.kind in _LAYERS)
            decided = {rule: tuple(dict.fromkeys(names)) for rule, names in by_rule.items()}
            found.append(Module(name, tuple(values), decided, tuple(weights), output))
    return tuple(found)

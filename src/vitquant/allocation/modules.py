"""The modules of mixed precision, which get bits of their own: the attention and the MLP of every block."""

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
    """A part of the model whose weights and activations share a bit width.

    Arguments:
        name: such as `blocks.0.attn`, the prefix of the names of its sites.
        values: the names of the values that get its bits, by the name of the recipe's rule that decides about them.
        weights: the number of elements of each of its weights, by state-dict key.
        output: the name of the tensor that is compared with float: the scaled scores of attention, `SITE:input` of its
            softmax, or the result of an MLP's last layer.
    """

    name: str
    values: dict[str, tuple[str, ...]]
    weights: dict[str, int]
    output: str


def follows(rule: Rule, bits: Bits) -> bool:
    """Whether the values of a rule get the bits of their module, as weights and activations do.

    Attention probabilities do so if they have the same bits as activations; a rule with a number keeps it.
    """
    symbol = None if rule.spec is None else rule.spec.bits
    return symbol in ("w", "a") or (symbol == "s" and bits.probs == bits.activations)


def find_modules(model: QuantizedModel) -> tuple[Module, ...]:
    """The modules of every block that have quantized weights, in graph order.

    A value that something outside of the module reads too, such as the residual stream, does not belong to it, and
    neither does an operation outside of attention and MLP, such as a convolution between them.
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

"""What a model gives: its tensors, in order, and what they are called."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

ONLY = "output"  # what a tensor is called that is all of a model's output
_TAKEN = "images"  # by the input, of every exported file


def named_tensors(output: Any) -> dict[str, Tensor]:
    """The floating-point tensors in what a model gives, by name, in the order in which its captured graph gives them.

    The name is the way to it: `logits` of a mapping or of transformers' outputs, `hidden_states.0` of a tuple in it,
    `1` of the second of a list; `output` where the model gives nothing else.

    Arguments:
        output: a tensor, or lists, tuples, mappings and what libraries register with torch's pytree, such as
            transformers' outputs, of tensors.
    """
    leaves, spec = pytree.tree_flatten(output)
    named = zip(_names(spec), leaves, strict=True)
    return {name: leaf for name, leaf in named if isinstance(leaf, Tensor) and leaf.is_floating_point()}


def output_names(module: GraphModule) -> tuple[str, ...]:
    """What each entry of a captured graph's output is called, whether it is a tensor or not; see `named_tensors`.

    Arguments:
        module: what `capture` returned, or a copy of it.
    """
    return _names(module.graph._codegen.pytree_info.out_spec)  # type: ignore[attr-defined]


def _names(spec: pytree.TreeSpec) -> tuple[str, ...]:
    ways = [".".join(way) or ONLY for way in _ways(spec)]
    if len(set(ways)) < len(ways) or not all(way.isprintable() and ":" not in way and way != _TAKEN for way in ways):
        # Keys may hold dots, and be anything; a colon parts a site from its operand.
        return tuple(str(place) for place in range(len(ways)))
    return tuple(ways)


def _ways(spec: Any) -> Iterator[tuple[str, ...]]:
    """The keys that lead to each leaf of a tree."""
    if spec.is_leaf():
        yield ()
        return
    context = spec.context
    fields = getattr(context, "_fields", context)  # a named tuple's context is its class
    children = spec.children()
    keys = fields if isinstance(fields, list | tuple) and len(fields) == len(children) else range(len(children))
    for key, child in zip(keys, children, strict=True):
        yield from ((str(key), *way) for way in _ways(child))

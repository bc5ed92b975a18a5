"""The output tensors of a model, in order, and their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from vitquant.errors import ModelError

ONLY = "output"  # the name of the tensor of a model that returns one tensor and nothing else
_TAKEN = "images"  # the name of the input in exported files


def named_tensors(output: Any) -> dict[str, Tensor]:
    """The floating-point tensors in a model's output, by name, in the order in which its captured graph gives them.

    The name is the path to the tensor: `logits` in a mapping or in transformers' outputs, `hidden_states.0` in a tuple
    therein, `1` for the second of a list; `output` where the model's output is one tensor.

    Arguments:
        output: a tensor, or lists, tuples, mappings and what libraries register with torch's pytree, such as
            transformers' outputs, of tensors.
    """
    leaves, spec = pytree.tree_flatten(output)
    named = zip(_names(spec), leaves, strict=True)
    return {name: leaf for name, leaf in named if isinstance(leaf, Tensor) and leaf.is_floating_point()}


def matched(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors in the order of some names: by name, or a single one whatever it is called.

    Arguments:
        tensors: of one form of a model, by name.
        names: of the outputs of another form.

    Raises:
        ModelError: there are more or fewer tensors, or several of other names.
    """
    if len(tensors) != len(names):
        raise ModelError(f"there are {len(tensors)} float tensors in an output, and not {len(names)}")
    if len(names) > 1 and set(names) != set(tensors):
        raise ModelError(f"outputs are called {', '.join(tensors)}, and not {', '.join(names)}: give the same model")
    return {names[0]: next(iter(tensors.values()))} if len(names) == 1 else {name: tensors[name] for name in names}


def output_names(module: GraphModule) -> tuple[str, ...]:
    """The name of each entry of a captured graph's output, whether it is a tensor or not; see `named_tensors`.

    Arguments:
        module: what `capture` returned, or a copy of it.
    """
    return _names(module.graph._codegen.pytree_info.out_spec)  # type: ignore[attr-defined]


def _names(spec: pytree.TreeSpec) -> tuple[str, ...]:
    ways = [".".join(way) or ONLY for way in _ways(spec)]
    if len(set(ways)) < len(ways) or not all(way.isprintable() and ":" not in way and way != _TAKEN for way in ways):
        # Keys may hold dots, and be any object; the colon is the separator between a site and its operand.
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

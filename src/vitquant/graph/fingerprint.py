"""A hash of a graph's structure, to tell whether two captures are the same computation."""

from __future__ import annotations

import hashlib
import operator

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node


def structural_fingerprint(module: GraphModule) -> str:
    """The sha256 of every operation, its arguments, and the shapes of the tensors it reads.

    Names of nodes and values of parameters are left out, and so is what differs between versions of torch: trailing
    arguments that are the operator's defaults, and the flag that lets cuDNN compute it.

    Arguments:
        module: a captured graph without quantizers.
    """
    digest = hashlib.sha256()
    number: dict[Node, int] = {}
    for node in module.graph.nodes:
        number[node] = len(number)
        parts = [node.op, _target(module, node), _text(_arguments(node), number), _text(node.kwargs, number)]
        digest.update(("|".join(parts) + "\n").encode())
    return digest.hexdigest()


def _arguments(node: Node) -> tuple[object, ...]:
    """The positional arguments of a node, without trailing ones that are defaults or the cuDNN flag."""
    found = list(node.args)
    if isinstance(node.target, OpOverload):
        declared = node.target._schema.arguments  # pyright: ignore[reportPrivateUsage]
        while found and _changes_nothing(declared[len(found) - 1], found[-1]):
            found.pop()
    return tuple(found)


def _changes_nothing(declared: torch.Argument, value: object) -> bool:
    return declared.has_default_value() and (
        declared.name.startswith("cudnn_enable")
        or (type(value) is type(declared.default_value) and value == declared.default_value)
    )


def _target(module: GraphModule, node: Node) -> str:
    if node.op == "get_attr":
        tensor = operator.attrgetter(str(node.target))(module)
        return f"{node.target}{tuple(tensor.shape)}{tensor.dtype}"
    if callable(node.target) and not hasattr(node.target, "overloadpacket"):
        return getattr(node.target, "__name__", "function")
    return "" if node.op in ("placeholder", "output") else str(node.target)


def _text(value: object, number: dict[Node, int]) -> str:
    if isinstance(value, Node):
        return f"%{number[value]}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_text(part, number) for part in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}={_text(part, number)}" for key, part in sorted(value.items())) + "}"
    return repr(value)

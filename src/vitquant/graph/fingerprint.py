"""A hash of a graph's structure, to tell whether two captures are the same computation."""

from __future__ import annotations

import hashlib
import operator

from torch.fx import GraphModule, Node


def structural_fingerprint(module: GraphModule) -> str:
    """The sha256 of every operation, its arguments, and the shapes of the tensors it reads.

    Names of nodes do not count, nor do the values of parameters.

    Arguments:
        module: a captured graph without quantizers.
    """
    digest = hashlib.sha256()
    number: dict[Node, int] = {}
    for node in module.graph.nodes:
        number[node] = len(number)
        parts = [node.op, _target(module, node), _text(node.args, number), _text(node.kwargs, number)]
        digest.update(("|".join(parts) + "\n").encode())
    return digest.hexdigest()


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

"""Stored tensors that a graph reads, perhaps through quantizers."""

from __future__ import annotations

import operator
from collections import Counter

from torch import Tensor
from torch.fx import GraphModule, Node


def unquantized(node: Node) -> Node:
    """The node before the quantizers that are applied directly to it."""
    while node.op == "call_module":
        node = node.all_input_nodes[0]
    return node


def stored(module: GraphModule, node: object) -> Tensor | None:
    """The parameter or buffer that a node reads, perhaps quantized; None where it is computed, or is not a node."""
    if not isinstance(node, Node) or unquantized(node).op != "get_attr":
        return None
    return operator.attrgetter(str(unquantized(node).target))(module)


def constants(module: GraphModule) -> dict[str, Tensor]:
    """The tensors that a graph reads and that its state dict lacks, by name: constants and non-persistent buffers."""
    saved = module.state_dict().keys()
    names = [str(node.target) for node in module.graph.nodes if node.op == "get_attr" and node.target not in saved]
    return {name: operator.attrgetter(name)(module) for name in names}


def times_read(module: GraphModule) -> Counter[int]:
    """How many times operations read each stored tensor under all of its names, keyed by the tensor's `id`."""
    counts: Counter[int] = Counter()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            counts[id(stored(module, node))] += _operations_that_read(node)
    return counts


def _operations_that_read(node: Node) -> int:
    """How many times operations read a node, directly or through a quantizer, which does not count as an operation."""
    return sum(
        _operations_that_read(user) if user.op == "call_module" else user.args.count(node) or 1 for user in node.users
    )

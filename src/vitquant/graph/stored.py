"""Stored tensors that a graph reads, looked for through the quantizers that stand on them."""

from __future__ import annotations

import operator
from collections import Counter

from torch import Tensor
from torch.fx import GraphModule, Node


def unquantized(node: Node) -> Node:
    """What a node is without the quantizers that stand directly on it."""
    while node.op == "call_module":
        node = node.all_input_nodes[0]
    return node


def stored(module: GraphModule, node: object) -> Tensor | None:
    """The parameter or buffer that a node is; None where it is computed, or no node."""
    if not isinstance(node, Node) or unquantized(node).op != "get_attr":
        return None
    return operator.attrgetter(str(unquantized(node).target))(module)


def constants(module: GraphModule) -> dict[str, Tensor]:
    """The tensors that a graph reads and its state dict lacks, by their name: what the model's code computes anew."""
    saved = module.state_dict().keys()
    names = [str(node.target) for node in module.graph.nodes if node.op == "get_attr" and node.target not in saved]
    return {name: operator.attrgetter(name)(module) for name in names}


def times_read(module: GraphModule) -> Counter[int]:
    """How often operations read each stored tensor, under whatever names, by the tensor's identity."""
    counts: Counter[int] = Counter()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            counts[id(stored(module, node))] += _operations_that_read(node)
    return counts


def _operations_that_read(node: Node) -> int:
    """A quantizer is no operation: those that read what it gives are."""
    return sum(
        _operations_that_read(user) if user.op == "call_module" else user.args.count(node) or 1 for user in node.users
    )

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


def times_read(module: GraphModule) -> Counter[int]:
    """How often the graph reads each stored tensor, under whatever names, by the tensor's identity."""
    counts: Counter[int] = Counter()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            counts[id(stored(module, node))] += sum(user.all_input_nodes.count(node) for user in node.users)
    return counts

"""Dataflow queries: where a tensor comes from, and which nodes depend on which."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Graph, Node

from vitquant.graph.operators import JOINS, arguments, calls, is_rearrangement, is_selection


def root(node: Node) -> Node:
    """The node whose elements `node` only rearranges: itself, or the first ancestor that computes or selects."""
    while is_rearrangement(node):
        node = node.all_input_nodes[0]
    return node


def origin(node: Node) -> Node:
    """The node whose elements `node` rearranges, selects from or pads with zeros: itself, or an ancestor."""
    while is_rearrangement(node) or is_selection(node):
        node = node.all_input_nodes[0]
    return node


def nodes_by_name(graph: Graph) -> dict[str, Node]:
    """The nodes of a graph by their names, which survive copies and pickles while nodes do not."""
    return {node.name: node for node in graph.nodes}


def descendants(nodes: Collection[Node], graph: Graph) -> set[Node]:
    """All nodes that are computed from the given ones, which are excluded unless one depends on another."""
    found: set[Node] = set()
    for node in graph.nodes:
        if any(each in nodes or each in found for each in node.all_input_nodes):
            found.add(node)
    return found


def selected_from(node: Node) -> Node | None:
    """The root of the tensor that `node` is a part of, or None when it is not a part of one tensor.

    A concatenation of parts of one tensor (patch merging) is a part of that tensor.
    """
    if is_selection(node):
        return root(node.all_input_nodes[0])
    if calls(node, JOINS):
        origins = {_origin(part) for part in arguments(node)[0]}
        whole = {root(part) for part in arguments(node)[0]}
        return origins.pop() if len(origins) == 1 and origins.isdisjoint(whole) else None
    return None


def _origin(node: Node) -> Node:
    """The tensor of which `node` is a part, through any number of selections."""
    node = root(node)
    while is_selection(node):
        node = root(node.all_input_nodes[0])
    return node


def ancestors(graph: Graph) -> dict[Node, int]:
    """For each node a bit set of the nodes it depends on, itself included; bit i is the i-th node.

    Python integers as bit sets keep this at one `or` per edge: a graph of 2,000 nodes takes a few milliseconds.
    """
    found: dict[Node, int] = {}
    for index, node in enumerate(graph.nodes):
        bits = 1 << index
        for argument in node.all_input_nodes:
            bits |= found[argument]
        found[node] = bits
    return found


def positions(graph: Graph) -> dict[Node, int]:
    """The position of each node in the graph's order, which is the number of its bit in `ancestors`."""
    return {node: index for index, node in enumerate(graph.nodes)}


def depends_on_input(graph: Graph) -> set[Node]:
    """The nodes whose value depends on the model's input; the rest depend on parameters and constants only."""
    found: set[Node] = set()
    for node in graph.nodes:
        is_size = node.meta.get("shape") is None and not _splits(node)
        if node.op == "placeholder" or (not is_size and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def _splits(node: Node) -> bool:
    """Whether the node gives a tuple of tensors (a split), which has no single shape."""
    return node.op == "call_function" and bool(node.meta.get("shapes"))


def path_between(ancestor: Node, node: Node) -> list[Node]:
    """The single-input chain from just below `ancestor` to `node`, in that order; empty when they are the same."""
    chain: list[Node] = []
    while node is not ancestor:
        chain.append(node)
        node = node.all_input_nodes[0]
    return chain[::-1]

"""Padding that is no data: what a maximum never chooses."""

from __future__ import annotations

from torch.fx import Node

from vitquant.graph.operators import arguments, aten, calls, is_rearrangement, is_selection


def unpadded(node: Node) -> Node:
    """What a max pool reads, before it was padded by a number (minus infinity, or a very small one).

    It is `node` itself where nothing pads it. The number says that there is nothing: a quantizer behind it would take
    it for the end of the range of values.
    """
    found = node
    while True:
        if _pads_by_a_number(node):
            found = node = arguments(node)[0]
        elif is_rearrangement(node) or is_selection(node):
            node = node.all_input_nodes[0]
        else:
            return found


def _pads_by_a_number(node: Node) -> bool:
    """Whether a node puts a number other than zero, which any quantizer has a code for, beside its first argument."""
    if calls(node, {aten.constant_pad_nd}):
        return any(arguments(node)[2:3])
    if calls(node, {aten.pad}):
        how = arguments(node)[2:]  # mode and value, each where it is not the default
        return how[:1] == ("constant",) and any(how[1:])
    return False

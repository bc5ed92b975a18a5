"""Padding of max pools with a number so small that the maximum never chooses it."""

from __future__ import annotations

from torch.fx import Node

from vitquant.graph.operators import arguments, aten, calls, is_rearrangement, is_selection


def unpadded(node: Node) -> Node:
    """The input of a max pool before it is padded with a number (minus infinity, or a very negative one).

    It is `node` itself where there is no such padding. The number is not data: a quantizer after the padding would take
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
    """Whether a node pads its first argument with a number other than zero; zero has a code in every quantizer."""
    if calls(node, {aten.constant_pad_nd}):
        return any(arguments(node)[2:3])
    if calls(node, {aten.pad}):
        how = arguments(node)[2:]  # mode and value, each where it is not the default
        return how[:1] == ("constant",) and any(how[1:])
    return False

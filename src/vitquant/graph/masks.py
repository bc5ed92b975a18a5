"""Masks between scores and their softmax: which node hides entries, and where the scores are still whole."""

from __future__ import annotations

import math
import operator

import torch
from torch.fx import GraphModule, Node

from vitquant.graph.operators import arguments, aten, calls, is_rearrangement, is_selection

# A score this far below its row's largest has no probability that any code holds. Libraries write -100, the smallest
# float or minus infinity.
_HIDING = -64.0


def unmasked(module: GraphModule, node: Node) -> Node:
    """The scores that a softmax reads, before any mask hides entries of them: `node` itself when none does.

    A mask is data about positions and not a range of values: a quantizer behind it would spread its levels over
    everything down to -100.
    """
    found = node
    while True:
        if is_rearrangement(node):
            node = node.all_input_nodes[0]
        elif hides(module, node):
            found = node = arguments(node)[0]
        else:
            return found


def masks_between(module: GraphModule, scores: Node, node: Node) -> list[Node]:
    """The nodes that hide entries on the way from `scores` to `node`, the last one first."""
    found = []
    while node is not scores:
        if hides(module, node):
            found.append(node)
        node = arguments(node)[0]
    return found


def hides(module: GraphModule, node: Node) -> bool:
    """Whether a node does nothing but hide entries of its first argument."""
    if calls(node, {aten.masked_fill}):
        value = arguments(node)[2]
        return isinstance(value, int | float) and value <= _HIDING
    if calls(node, {aten.add}) and not node.kwargs:
        return is_mask(module, arguments(node)[1])
    return False


def is_mask(module: GraphModule, node: object) -> bool:
    """Whether a node is a constant that, added to scores, hides some of them and leaves the others as they are."""
    mask = _constant(module, node)
    return mask is not None and bool(((mask == 0) | (mask <= _HIDING)).all()) and bool((mask != 0).any())


def hide_exactly(module: GraphModule, node: Node) -> None:
    """Rewrite a hiding node in place as `masked_fill(scores, hidden, -inf)`."""
    graph = module.graph
    if calls(node, {aten.masked_fill}):
        node.target, node.args = aten.masked_fill.Scalar, (*arguments(node)[:2], -math.inf)
        return
    mask = arguments(node)[1]
    with graph.inserting_before(node):
        hidden = graph.call_function(aten.lt.Scalar, (mask, 0.0))
    hidden.meta = {**mask.meta, "dtype": torch.bool}
    node.target, node.args = aten.masked_fill.Scalar, (arguments(node)[0], hidden, -math.inf)


def _constant(module: GraphModule, node: object) -> torch.Tensor | None:
    """The stored floating tensor, no parameter, that a node rearranges or selects from; else None."""
    while isinstance(node, Node) and (is_rearrangement(node) or is_selection(node)):
        node = node.all_input_nodes[0]
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    tensor = operator.attrgetter(str(node.target))(module)
    return None if isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point() else tensor

"""Masks between scores and their softmax: which nodes mask entries, and which node holds the unmasked scores."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from vitquant.graph.operators import FILLS, arguments, aten, calls, is_rearrangement, packet
from vitquant.graph.walk import origin

# A score this far below the largest of its row has a probability too small for any code. Libraries add -100, the most
# negative float or minus infinity.
_MASKING = -64.0


def unmasked(module: GraphModule, node: Node) -> Node:
    """The scores that a softmax reads, before any mask is applied: `node` itself where there is no mask.

    A mask marks positions and is not a range of values: a quantizer after it would spread its levels down to -100.
    """
    found = node
    while True:
        if is_rearrangement(node):
            node = node.all_input_nodes[0]
        elif is_mask_on(module, node):
            found = node = arguments(node)[0]
        else:
            return found


def masks_between(module: GraphModule, scores: Node, node: Node) -> list[Node]:
    """The nodes that mask entries on the way from `scores` to `node`, the last one first."""
    found = []
    while node is not scores:
        if is_mask_on(module, node):
            found.append(node)
        node = arguments(node)[0]
    return found


def is_mask_on(module: GraphModule, node: Node) -> bool:
    """Whether a node does nothing but mask entries of its first argument."""
    if calls(node, {aten.masked_fill}):
        value = arguments(node)[2]
        return isinstance(value, int | float) and value <= _MASKING
    if calls(node, {aten.add}) and not node.kwargs:
        return is_mask(module, arguments(node)[1])
    return False


def is_mask(module: GraphModule, node: object) -> bool:
    """Whether a node is a constant that, added to scores, masks some of them and leaves the others as they are."""
    mask = stored_constant(module, node)
    return mask is not None and hides_some(mask)


def hides_some(mask: torch.Tensor) -> bool:
    """Whether a tensor that is added to scores masks some of them and leaves the others as they are."""
    if not mask.is_floating_point():
        return False
    return bool(((mask == 0) | (mask <= _MASKING)).all()) and bool((mask != 0).any())


def masked_by_infinity(module: GraphModule, node: Node) -> Node | None:
    """The boolean mask from which an additive mask of zeros and minus infinity was made; None where it was not.

    Libraries make such additive masks of boolean ones for padding that depends on the image.

    Returns:
        A new boolean node of the mask's shape, true where entries are masked.
    """

    def find(made: Node) -> Node | None:
        return _masked_in_sum(module, made) if calls(made, {aten.add}) else _masked_by_fill(module, made)

    return _behind_moves(module, node, find)


def _behind_moves(module: GraphModule, node: Node, find: Callable[[Node], Node | None]) -> Node | None:
    """The result of `find` for the node that `node` rearranges or expands, with the same moves; None if it is None."""
    moves, made = [], node
    while is_rearrangement(made) or calls(made, {aten.expand}):
        moves.append(made)
        made = made.all_input_nodes[0]
    found = find(made)
    for move in reversed(moves if found is not None else []):
        with module.graph.inserting_before(move):
            copy = module.graph.node_copy(move, {**{each: each for each in move.all_input_nodes}, made: found}.get)
        copy.meta = {**move.meta, "dtype": torch.bool}
        made, found = move, copy
    return found


def _masked_by_fill(module: GraphModule, made: Node) -> Node | None:
    """The condition that selects between minus infinity (true) and zero in a `masked_fill` or `where`; else None."""
    if calls(made, {aten.masked_fill}):
        shown, condition, masked = arguments(made)
    elif calls(made, {aten.where}) and len(arguments(made)) == 3:
        condition, masked, shown = arguments(made)
    else:
        return None
    numbers = _number(module, shown), _number(module, masked)
    if condition.meta["shape"] != made.meta["shape"] or set(numbers) != {0.0, -math.inf}:
        return None
    return condition if numbers[0] == 0.0 else _boolean(module, made, aten.logical_not.default, condition)


def _masked_in_sum(module: GraphModule, made: Node) -> Node | None:
    """The entries that a sum of two masks masks, as in nn.MultiheadAttention; either mask may be a constant."""
    if made.kwargs:  # `alpha`: a multiple is added
        return None
    found = []
    for part in arguments(made):
        masked = None
        if isinstance(part, Node):
            masked = _behind_moves(module, part, partial(_masked_by_fill, module))
        constant = stored_constant(module, part)
        if constant is not None and bool(((constant == 0) | (constant == -math.inf)).all()):
            masked = _boolean(module, made, aten.lt.Scalar, part, 0.0, shape=part.meta["shape"])
        if masked is None:
            return None
        found.append(masked)
    return _boolean(module, made, aten.logical_or.default, *found)


def _boolean(
    module: GraphModule, before: Node, target: Any, *args: object, shape: tuple[int, ...] | None = None
) -> Node:
    """A new boolean node, inserted before another and with its shape unless one is given."""
    with module.graph.inserting_before(before):
        node = module.graph.call_function(target, args)  # type: ignore[arg-type]
    node.meta = {**before.meta, "dtype": torch.bool, "shape": before.meta["shape"] if shape is None else shape}
    return node


def _number(module: GraphModule, value: object) -> float | None:
    """The number that every element of a node or argument equals; None where they are not known to be equal."""
    if isinstance(value, Node) and calls(value, FILLS):
        number = FILLS[packet(value)]
        value = arguments(value)[2] if number is None else number
    elif isinstance(value, Node) and calls(value, {aten.full, aten.full_like}):
        value = arguments(value)[1]
    elif calls(value, {aten.zeros}):
        value = 0
    if isinstance(value, int | float):
        return float(value)
    constant = stored_constant(module, value)
    if constant is None or not constant.numel() or not bool((constant == constant.flatten()[0]).all()):
        return None
    return float(constant.flatten()[0])


def masks_whole_rows(masks: Sequence[torch.Tensor]) -> bool:
    """Whether the masks of one softmax, each alone or combined, mask every entry of some row.

    The softmax of such a row, whose scores are all minus infinity, is NaN.

    Arguments:
        masks: boolean masks of `masked_fill`, true where an entry is masked, or floats that are added to scores.
    """
    together: list[torch.Tensor] = []
    for mask in masks:
        masked = mask if mask.dtype == torch.bool else mask <= _MASKING
        both = []
        for other in together:
            with suppress(RuntimeError):  # shapes that do not broadcast, such as those of windows
                both.append(masked | other)
        together += [masked, *both]
    return any(bool(masked.all(-1).any()) for masked in together)


def mask_exactly(module: GraphModule, node: Node) -> None:
    """Rewrite a masking node in place as `masked_fill(scores, masked, -inf)`."""
    if calls(node, {aten.masked_fill}):
        node.target, node.args = aten.masked_fill.Scalar, (*arguments(node)[:2], -math.inf)
        return
    mask = arguments(node)[1]
    masked = _boolean(module, node, aten.lt.Scalar, mask, 0.0, shape=mask.meta["shape"])
    node.target, node.args = aten.masked_fill.Scalar, (arguments(node)[0], masked, -math.inf)


def stored_constant(module: GraphModule, node: object) -> torch.Tensor | None:
    """The stored float constant (a buffer, not a parameter) that a node rearranges or selects from; else None."""
    source = origin(node) if isinstance(node, Node) else None
    if source is None or source.op != "get_attr":
        return None
    tensor = operator.attrgetter(str(source.target))(module)
    return None if isinstance(tensor, torch.nn.Parameter) or not tensor.is_floating_point() else tensor

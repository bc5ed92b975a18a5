"""`einsum` of two tensors as one `matmul`, with the batch and the heads as axes of their own."""

from __future__ import annotations

import math
from typing import Any

from torch.fx import Node

from vitquant.graph.operators import arguments, aten


def einsum_to_matmul(node: Node) -> None:
    """Rewrite an einsum as permutations around `matmul`, in place.

    An einsum that is not a matrix product (an ellipsis, a diagonal, three operands, an axis that is in one operand and
    not in the result) is left as it is.
    """
    equation, operands = arguments(node)[:2]
    inputs, arrow, output = str(equation).replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or "." in inputs or len(terms) != 2 or any(len(set(term)) != len(term) for term in terms):
        return
    left, right = terms
    batch = [label for label in output if label in left and label in right]
    rows = [label for label in output if label in left and label not in right]
    columns = [label for label in output if label in right and label not in left]
    summed = [label for label in left if label in right and label not in output]
    groups = batch, rows, columns, summed
    if set().union(*groups) != set(left + right):
        return
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        for label, size in zip(term, operand.meta["shape"], strict=True):
            if sizes.setdefault(label, size) != size:
                return  # an axis of size 1 is broadcast
    if sum(size == -1 for size in sizes.values()) > 1:
        return
    with node.graph.inserting_before(node):
        first = _arranged(node, operands[0], left, [*([label] for label in batch), rows, summed], sizes)
        second = _arranged(node, operands[1], right, [*([label] for label in batch), summed, columns], sizes)
        shape = (*(sizes[label] for label in batch), _size(rows, sizes), _size(columns, sizes))
        result = _call(node, aten.matmul.default, (first, second), shape)
        labels = [*batch, *rows, *columns]
        split = tuple(sizes[label] for label in labels)
        if split != shape:
            result = _call(node, aten.reshape.default, (result, list(split)), split)
        result = _permuted(node, result, labels, list(output), sizes)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _arranged(like: Node, operand: Node, labels: str, groups: list[list[str]], sizes: dict[str, int]) -> Node:
    """The operand with one axis for each group of labels."""
    order = [label for group in groups for label in group]
    operand = _permuted(like, operand, list(labels), order, sizes)
    if len(order) == len(groups) and all(len(group) == 1 for group in groups):
        return operand
    shape = tuple(_size(group, sizes) for group in groups)
    return _call(like, aten.reshape.default, (operand, list(shape)), shape)


def _permuted(like: Node, node: Node, before: list[str], after: list[str], sizes: dict[str, int]) -> Node:
    if before == after:
        return node
    order = [before.index(label) for label in after]
    return _call(like, aten.permute.default, (node, order), tuple(sizes[label] for label in after))


def _size(labels: list[str], sizes: dict[str, int]) -> int:
    """The product of the axes' sizes; -1 when one of them grows with the batch."""
    return max(-1, math.prod(sizes[label] for label in labels))


def _call(like: Node, target: Any, args: tuple[Any, ...], shape: tuple[int, ...]) -> Node:
    node = like.graph.call_function(target, args)
    node.meta = {**like.meta, "shape": shape}
    return node

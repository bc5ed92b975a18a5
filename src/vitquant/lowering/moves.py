"""Translation of a graph's rearrangements to the five moves of a program: reshape, permute, slice, roll and pad."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from vitquant.graph.operators import arguments, aten, calls, packet
from vitquant.program.instructions import Move, Pad, Permute, Reshape, Roll, Slice

_RESHAPES = {
    aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze,
}  # fmt: skip
_SAME = {aten.alias, aten.clone, aten.contiguous, aten.detach}
_END = 2**62


class NoMoveError(Exception):
    """A rearrangement that programs cannot express; the message names it."""


def moves(node: Node, shape: tuple[int, ...], result: tuple[int, ...]) -> list[Move]:
    """The moves that a node applies to one register; the names of registers and site in them are empty.

    Arguments:
        node: a rearrangement or a selection of one tensor.
        shape: of its input, -1 for the size that grows with the batch.
        result: the shape of its result, in the same form.

    Raises:
        NoMoveError: programs cannot express the node.
    """
    rank = len(shape)
    if calls(node, _SAME):
        return []
    if calls(node, _RESHAPES):
        return [_reshape(result)]
    match packet(node):
        case aten.permute:
            return [Permute("", "", "", tuple(axis % rank for axis in arguments(node)[1]))]
        case aten.transpose | aten.t:
            first, second = (int(axis) % rank for axis in (*arguments(node)[1:], 0, 1)[:2])
            axes = list(range(rank))
            axes[first], axes[second] = axes[second], axes[first]
            return [Permute("", "", "", tuple(axes))]
        case aten.roll:
            given = arguments(node)
            shifts, axes = given[1], given[2] if len(given) > 2 else ()
            if not axes:
                raise NoMoveError("a roll over the flattened tensor")
            return [Roll("", "", "", tuple(shifts), tuple(axis % rank for axis in axes))]
        case aten.pad | aten.constant_pad_nd:
            return _pad(node)
        case aten.select:
            axis, index = int(arguments(node)[1]) % rank, int(arguments(node)[2])
            return [_slice(axis, index % shape[axis], index % shape[axis] + 1), _reshape(result)]
        case aten.slice:
            return [_general_slice(shape, *arguments(node)[1:])]
        case aten.expand if shape == result:
            return []
        case _ if node.target is operator.getitem:
            return _part(node, shape, result)
        case _:
            raise NoMoveError(str(packet(node)).removeprefix("aten."))


def _reshape(result: tuple[int, ...]) -> Reshape:
    if sum(size == -1 for size in result) > 1:
        raise NoMoveError("a reshape to two sizes that grow with the batch")
    return Reshape("", "", "", result)


def _slice(axis: int, start: int, stop: int, step: int = 1) -> Slice:
    return Slice("", "", "", axis, start, stop, step)


def _general_slice(shape: tuple[int, ...], axis: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> Slice:
    axis %= len(shape)
    size = shape[axis]
    if size == -1 or not all(bound is None or isinstance(bound, int) for bound in (start, stop)):
        raise NoMoveError("a part of the batch")
    first, last, _ = slice(start, None if stop is None or stop >= _END else stop).indices(size)
    return _slice(axis, first, last, step)


def _pad(node: Node) -> list[Move]:
    _, amounts, *rest = arguments(node)
    mode, value = ("constant", rest[0] if rest else 0) if packet(node) is aten.constant_pad_nd else (
        rest[0] if rest else "constant", rest[1] if len(rest) > 1 else 0)  # fmt: skip
    if mode != "constant" or value not in (0, 0.0, None) or not all(isinstance(a, int) for a in amounts):
        raise NoMoveError("padding with other than zeros")
    if min(amounts) < 0:
        raise NoMoveError("padding that cuts off")
    return [Pad("", "", "", tuple(amounts), 0)]


def _part(node: Node, shape: tuple[int, ...], result: tuple[int, ...]) -> list[Move]:
    """One part of a split, or one index of an unbind."""
    split, index = arguments(node)
    given: tuple[Any, ...] = arguments(split)
    if calls(split, {aten.unbind}):
        axis = (int(given[1:2][0]) if given[1:2] else 0) % len(shape)
        return [_slice(axis, index, index + 1), _reshape(result)]
    axis = (int(given[2:3][0]) if given[2:3] else 0) % len(shape)
    if calls(split, {aten.split, aten.split_with_sizes}):
        (sizes,) = given[1:2]
        starts = [index * sizes] if isinstance(sizes, int) else [sum(sizes[:index])]
        return [_slice(axis, starts[0], starts[0] + result[axis])]
    if calls(split, {aten.chunk}):
        width = -(-shape[axis] // int(given[1:2][0]))
        return [_slice(axis, index * width, index * width + result[axis])]
    raise NoMoveError(str(packet(split)).removeprefix("aten."))

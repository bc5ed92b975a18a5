"""Lowering of rearrangements: of registers, and of the scales and zero points that are broadcast to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor
from torch.fx import Node

from vitquant.graph.operators import arguments, aten, calls, packet
from vitquant.lowering.context import Context, Value, growing_shape, nothing
from vitquant.lowering.moves import NoMoveError, moves
from vitquant.lowering.scaled import Joined, Masked, Scaled, Static, Term, compact, dense, size_along
from vitquant.program.instructions import Concat, Move, Pad, Register, Reshape, smallest_type
from vitquant.program.moving import move

SPLITS = {aten.unbind, aten.split, aten.split_with_sizes, aten.chunk}


def joined(context: Context, node: Node) -> Joined:
    """A concatenation or a stack; its parts keep their scales until a quantizer reads it."""
    parts = []
    for part in arguments(node)[0]:
        if 0 in context.one_image[part]:
            continue
        value = context.value(part)
        value = together(context, value) if isinstance(value, Joined) else value
        if not isinstance(value, Scaled | Static):
            raise context.refuse("it joins a tensor that is not quantized", "quantize its parts")
        parts.append((value, part))
    axis = (int(arguments(node)[1]) if len(arguments(node)) > 1 else 0) % len(node.meta["shape"])
    if packet(node) is aten.cat:
        return Joined(tuple(value for value, _ in parts), axis, node)
    wider = tuple(_with_axis(context, value, part, axis) for value, part in parts)
    return Joined(wider, axis, node)


def _with_axis(context: Context, value: Scaled | Static, part: Node, axis: int) -> Scaled | Static:
    if isinstance(value, Static):
        return Static(value.value.unsqueeze(axis))
    shape, one = growing_shape(part), context.one_image[part]
    return walk(context, value, [Reshape("", "", "", (*shape[:axis], 1, *shape[axis:]))], shape, one)


def together(context: Context, value: Joined) -> Scaled:
    """The concatenation of the parts as one value: registers are concatenated, and their scales along with them."""
    parts = [part for part in value.parts if isinstance(part, Scaled)]
    if len(parts) < len(value.parts):
        raise context.refuse("what it reads is joined from an activation and a constant", "quantize the parts")
    one, axis = context.one_image[value.node], value.axis
    parts = [context.linear(part) for part in parts]
    parts = [_foldable(context, part, shape_of(context, part)) for part in parts]
    widths = [shape_of(context, part)[axis] for part in parts]

    def beside(values: Sequence[Tensor]) -> Tensor:
        shapes = [(*one[:axis], width, *one[axis + 1 :]) for width in widths]
        return compact(torch.cat([dense(each, shape) for each, shape in zip(values, shapes, strict=True)], axis))

    terms = []
    for each in zip(*_of_one_length([part.terms for part in parts]), strict=True):
        limits = [context.registers[term.register].limits for term in each]
        kind = smallest_type(min(low for low, _ in limits), max(high for _, high in limits))
        registers = tuple(term.register for term in each)
        register = context.emit(Concat, Register(kind, growing_shape(value.node)), inputs=registers, axis=axis)
        zero, scale = beside([term.zero for term in each]), beside([term.scale for term in each])
        terms.append(Term(register, zero, scale, numerators=all(term.numerators for term in each)))
    return Scaled(tuple(terms), beside([part.constant for part in parts]))


def _of_one_length(parts: Sequence[tuple[Term, ...]]) -> list[tuple[Term, ...]]:
    """The sums padded to the same number of terms, with terms of scale zero."""
    most = max(map(len, parts))
    return [(*terms, *[replace(terms[0], scale=nothing())] * (most - len(terms))) for terms in parts]


def moved(context: Context, node: Node) -> Value:
    """A rearrangement or a selection."""
    source = node.all_input_nodes[0]
    if calls(source, SPLITS) and not source.meta.get("shape"):
        source = source.all_input_nodes[0]
    value = context.value(source)
    if isinstance(value, Masked):
        if not _keeps_rows(context, source, node):
            raise context.refuse("the rows of masked scores are rearranged", "apply the mask last")
        return replace(value, moved=(*value.moved, node))
    value = together(context, value) if isinstance(value, Joined) else value
    if not isinstance(value, Scaled):
        raise context.refuse("it rearranges what is no sum of integers", "quantize it")
    return follow(context, value, source, node)


def follow(context: Context, value: Scaled, source: Node, node: Node) -> Scaled:
    """A value of the shape of `source`, rearranged in the same way as `node` rearranges `source`."""
    steps = _moves(context, source, node)
    return walk(context, value, steps, growing_shape(source), context.one_image[source])


def _moves(context: Context, source: Node, node: Node) -> list[Move]:
    try:
        return moves(node, growing_shape(source), growing_shape(node))
    except NoMoveError as reason:
        raise context.refuse(f"{reason} has no integer form") from None


def _keeps_rows(context: Context, source: Node, node: Node) -> bool:
    """Whether a rearrangement keeps the set of elements in each row, that is along the last axis."""
    one = context.one_image[source]
    row = torch.arange(prod(one[:-1])).view(*one[:-1], 1).expand(one)
    for step in _moves(context, source, node):
        row = move(step, row)
    same_length = growing_shape(node)[-1:] == growing_shape(source)[-1:]  # for one image they may be equal by chance
    return same_length and torch.equal(row, row[..., :1].expand_as(row))


def shape_of(context: Context, value: Scaled) -> tuple[int, ...]:
    """The shape to which the registers of a value broadcast; -1 for the size that grows with the batch."""
    shapes = [context.registers[term.register].shape for term in value.terms]
    rank = max(map(len, shapes))
    filled = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(-1 if -1 in sizes else max(sizes) for sizes in zip(*filled, strict=True))


def _foldable(context: Context, value: Scaled, shape: tuple[int, ...]) -> Scaled:
    """The value with registers that all have its shape: constants that are broadcast are added to its constant part.

    Raises:
        LoweringError: a register that depends on the image is broadcast.
    """
    terms, constant = [], value.constant
    for term in value.terms:
        if context.registers[term.register].shape == shape:
            terms.append(term)
        elif term.register in context.constants:
            constant = constant + term.scale * (context.constants[term.register] - term.zero)
        else:
            raise context.refuse("it rearranges a sum in which a part is repeated", "quantize the sum first")
    return Scaled(tuple(terms), constant)


def walk(
    context: Context, value: Scaled, steps: Sequence[Move], shape: tuple[int, ...], one: tuple[int, ...]
) -> Scaled:
    """A value after some moves.

    Arguments:
        shape, one: the shape of the value for any batch, with -1, and for one image.
    """
    value = _foldable(context, value, shape) if steps else value
    for step in steps:
        value, shape, one = _step(context, value, step, shape, one)
    return value


def _step(
    context: Context, value: Scaled, step: Move, shape: tuple[int, ...], one: tuple[int, ...]
) -> tuple[Scaled, tuple[int, ...], tuple[int, ...]]:
    after = tuple(move(step, torch.empty(one, dtype=torch.int8)).shape)
    growing = _growing(step, shape, one, after)
    terms = []
    for term in value.terms:
        given = {name: field for name, field in vars(step).items() if name not in ("output", "site", "input")}
        if isinstance(step, Pad):
            given["value"] = context.zero(term, "input")
        written = Register(context.registers[term.register].type, growing)
        register = context.emit(type(step), written, input=term.register, **given)
        zero, scale = (_rearranged(context, values, step, shape, one) for values in (term.zero, term.scale))
        terms.append(replace(term, register=register, zero=zero, scale=scale))
    constant = value.constant
    if isinstance(step, Pad) and bool(constant.any()):  # the padding is zero, and not the constant
        constant = dense(constant, one)
    return Scaled(tuple(terms), _rearranged(context, constant, step, shape, one)), growing, after


def _growing(step: Move, shape: tuple[int, ...], one: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...]:
    """The shape after a move, with -1 for the size that grows with the batch."""
    double = [2 * size if grows == -1 else size for size, grows in zip(one, shape, strict=True)]
    doubled = move(step, torch.empty(double, dtype=torch.int8)).shape
    return tuple(size if size == other else -1 for size, other in zip(after, doubled, strict=True))


def _rearranged(context: Context, values: Tensor, step: Move, shape: tuple[int, ...], one: tuple[int, ...]) -> Tensor:
    """Values that are broadcast to a register, such as scales, after the register is moved."""
    if values.numel() == 1:
        return values.reshape(())
    step = replace(step, value=0) if isinstance(step, Pad) else step
    after = move(step, dense(values, one))
    grown = _growing(step, shape, one, tuple(after.shape))
    axis = grown.index(-1)
    small = compact(after)
    if size_along(small, axis - len(grown)) > 1:  # then the values must repeat for each image
        two = move(step, torch.cat([dense(values, one)] * 2, shape.index(-1)))
        if not torch.equal(two, torch.cat([after, after], axis)):
            raise context.refuse("scales differ along an axis that has the images inside", "keep images outermost")
    return small

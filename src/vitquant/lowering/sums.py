"""Lowering of products, convolutions and pooling, which sum codes in 32 bits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product as pairs
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vitquant.graph.operators import arguments, aten, calls
from vitquant.lowering.context import Context, accumulated, growing_shape, nothing, operator_name, options
from vitquant.lowering.scaled import Scaled, Static, Term, size_along
from vitquant.program.instructions import Convolution, Linear, Multiply, Product, Register, Sum


def linear(context: Context, node: Node) -> Scaled:
    """A linear layer."""
    source, weight = _layer(context, node, summed=(-1,))
    scale = source.scale * weight.scale.flatten()
    bias, rest = _bias(context, options(node, "bias").get("bias"), scale)
    output = context.emit(
        Linear, Register("s32", growing_shape(node)), input=source.register, weight=weight.register, bias=bias,
        input_zero=context.zero(source, "input"), weight_zero=_weight_zero(context, weight),
    )  # fmt: skip
    return accumulated(output, scale).plus(rest)


def convolution(context: Context, node: Node) -> Scaled:
    """A two-dimensional convolution."""
    given = options(node, "bias", "stride", "padding", "dilation", "groups")
    if not calls(node, {aten.conv2d}):
        raise context.refuse(f"{operator_name(node)} has no integer form")
    if isinstance(given.get("padding"), str):
        raise context.refuse(f"its padding is {given['padding']!r}", "give it as numbers")
    source, weight = _layer(context, node, summed=(-4, -3, -2, -1))
    scale = source.scale.reshape(()) * weight.scale.flatten()
    bias, rest = _bias(context, given.get("bias"), scale)
    output = context.emit(
        Convolution, Register("s32", growing_shape(node)), input=source.register, weight=weight.register, bias=bias,
        input_zero=context.zero(source, "input"), weight_zero=_weight_zero(context, weight),
        stride=_pair(given.get("stride", 1)), padding=_pair(given.get("padding", 0)),
        dilation=_pair(given.get("dilation", 1)), groups=int(given.get("groups", 1)),
    )  # fmt: skip
    return accumulated(output, scale.view(-1, 1, 1)).plus(rest.view(-1, 1, 1) if rest.ndim else rest)


def product(context: Context, node: Node) -> Scaled:
    """A matrix product of two activations."""
    return _of_two(context, node, Product, summed=((-1,), (-2,)))


def multiplied(context: Context, node: Node) -> Scaled:
    """Two activations multiplied element by element, as a gate does."""
    return _of_two(context, node, Multiply, summed=((), ()))


def _of_two(
    context: Context, node: Node, kind: type[Product | Multiply], summed: tuple[Sequence[int], Sequence[int]]
) -> Scaled:
    """The sum of the products of each left term with each right term; powers of sqrt(2) have two terms.

    Arguments:
        summed: the axes of each operand that are summed over, counted from the last.
    """
    lefts, rights = (
        context.factors(argument, "operand", axes) for argument, axes in zip(arguments(node)[:2], summed, strict=True)
    )
    total = Scaled((), nothing())
    for left, right in pairs(lefts, rights):
        output = context.emit(
            kind, Register("s32", growing_shape(node)), left=left.register, right=right.register,
            left_zero=context.zero(left, "operand"), right_zero=context.zero(right, "operand"),
        )  # fmt: skip
        total = total.plus(accumulated(output, left.scale * right.scale))
    return total


def mean(context: Context, node: Node) -> Scaled:
    """A mean over some axes, as a sum."""
    term, read = context.term(arguments(node)[0], "input"), growing_shape(arguments(node)[0])
    axes, keep = _pooled(context, node, read)
    if any(read[axis] == -1 for axis in axes):
        raise context.refuse("it averages over the batch", "average over other axes")
    scale, count = term.scale, 1
    for axis in axes:
        count *= read[axis]
        if scale.ndim >= len(read) - axis and scale.shape[axis - len(read)] != 1:
            raise context.refuse("its input has a scale for each thing that it sums", "use per = tensor")
    if not keep and scale.ndim:
        scale = _without(scale, axes, len(read))
    output = context.emit(
        Sum, Register("s32", growing_shape(node)), input=term.register, axes=axes, keep=keep,
        input_zero=context.zero(term, "input"),
    )  # fmt: skip
    return accumulated(output, scale / count)


def _layer(context: Context, node: Node, summed: Sequence[int]) -> tuple[Term, Term]:
    """The input and the weight of a layer that sums over some axes of its input."""
    read, weights = arguments(node)[:2]
    source, weight = context.factor(read, "input", summed), context.term(weights, "weight")
    if weight.scale.numel() not in (1, context.registers[weight.register].shape[0]) or (
        weight.scale.numel() > 1 and weight.scale.shape[0] == 1
    ):
        raise context.refuse("its weight's scales are not those of its outputs", "use per = axis")
    return source, weight


def _weight_zero(context: Context, weight: Term) -> str | None:
    return context.constant(f"{context.site}.weight_zero", weight.zero) if bool(weight.zero.any()) else None


def _bias(context: Context, node: Node | None, scale: Tensor) -> tuple[str | None, Tensor]:
    """The bias rounded to the accumulator's scale, and the rounding error, which the next requantization adds.

    Where scales differ between rows, a channel's accumulators have several scales, and the requantization adds the
    whole bias.
    """
    if node is None:
        return None, nothing()
    value = context.value(node)
    if not isinstance(value, Static):
        raise context.refuse("its bias depends on the image")
    if scale.numel() > max(1, size_along(scale, -1)):
        return None, value.value
    bias = torch.round(value.value / scale)
    if float(bias.abs().max()) >= 2**31:
        reason = "its bias does not fit 32 bits on the scale of its sums"
        raise context.refuse(reason, "calibrate it on other images, or use more bits for its weight")
    return context.constant(f"{context.site}.bias", bias, "s32"), value.value - bias * scale


def _pooled(context: Context, node: Node, read: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    """The axes of a mean, and whether they are kept with size one."""
    if calls(node, {aten.mean}):
        given = options(node, "keepdim")
        axes = arguments(node)[1] if len(arguments(node)) > 1 else None
        axes = range(len(read)) if axes is None else axes
        return tuple(sorted(int(axis) % len(read) for axis in axes)), bool(given.get("keepdim", False))
    size = arguments(node)[1]
    sizes = list(size) if isinstance(size, list | tuple) else [size]
    if any(int(s) != 1 for s in sizes):
        raise context.refuse("it averages over windows")
    return tuple(range(len(read) - len(sizes), len(read))), True


def _without(values: Tensor, axes: Sequence[int], rank: int) -> Tensor:
    return values.view([1] * (rank - values.ndim) + list(values.shape)).squeeze(tuple(axes))


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(int(v) for v in value) if isinstance(value, list | tuple) else (int(value),)
    return (values[0], values[-1])

"""Sums, and scaling and shifting by constants, which fuse into the scales and constants of a later rounding."""

from __future__ import annotations

import torch
from torch.fx import Node

from vitquant.graph.operators import arguments, aten, packet
from vitquant.integer.correct_rounding import CorrectRounding
from vitquant.lowering.context import Context, Value, operator_name
from vitquant.lowering.rearrangement import together
from vitquant.lowering.scaled import Joined, Scaled, Static
from vitquant.lowering.sums import multiplied


def elementwise(context: Context, node: Node) -> Value:
    """Addition, subtraction, multiplication and division."""
    left, right = (_whole(context, context.operand(argument)) for argument in arguments(node)[:2])
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
        raise context.refuse("it adds a multiple, or divides by whole numbers", "write it as products and sums")
    match packet(node), left, right:
        case aten.mul, Scaled(), Scaled():
            return multiplied(context, node)
        case aten.mul, Scaled(), Static():
            return left.times(right.value)
        case aten.mul, Static(), Scaled():
            return right.times(left.value)
        case aten.div, Scaled(), Static():
            return left.times(1.0 / right.value)
        case aten.add, Scaled(), Static():
            return left.plus(right.value)
        case aten.add, Static(), Scaled():
            return right.plus(left.value)
        case aten.add, Scaled(), Scaled():
            return left.plus(right)
        case aten.sub, Scaled(), Static():
            return left.plus(-right.value)
        case aten.sub, Static(), Scaled():
            return negated(right).plus(left.value)
        case aten.sub, Scaled(), Scaled():
            return left.plus(negated(right))
        case _:
            raise context.refuse(f"{operator_name(node)} of these has no integer form")


def negation(context: Context, node: Node) -> Scaled:
    """Minus the argument."""
    value = _whole(context, context.value(arguments(node)[0]))
    if not isinstance(value, Scaled):
        raise context.refuse("what it reads is not a sum of integers", "quantize it")
    return negated(value)


def batch_norm(context: Context, node: Node) -> Scaled:
    """Batch norm with running statistics, which is a factor and a constant for each channel."""
    value = _whole(context, context.value(arguments(node)[0]))
    if not isinstance(value, Scaled):
        raise context.refuse("what it normalizes is not a sum of integers", "quantize it")
    gain, bias, mean, variance = (context.static[p] if isinstance(p, Node) else None for p in arguments(node)[1:5])
    if mean is None or variance is None:
        raise context.refuse("it has no running statistics", "track them")
    epsilon = float(arguments(node)[7])
    with CorrectRounding():
        deviation = torch.sqrt(variance.double() + epsilon)
    factor = (1.0 if gain is None else gain.double()) / deviation
    constant = (0.0 if bias is None else bias.double()) - mean.double() * factor
    shape = (-1, *[1] * (len(node.meta["shape"]) - 2))
    return value.times(factor.view(shape)).plus(constant.view(shape))


def _whole(context: Context, value: Value) -> Value:
    return together(context, value) if isinstance(value, Joined) else value


def negated(value: Scaled) -> Scaled:
    """Minus a value."""
    return value.times(torch.tensor(-1.0))

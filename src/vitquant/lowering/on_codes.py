"""Lowering of softmax, norms and activations, which map codes to codes."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from vitquant.graph.operators import arguments
from vitquant.integer_modules import (
    IntegerLayerNorm,
    IntegerOperation,
    IntegerRmsNorm,
    IntegerSoftmax,
    LogIntSoftmax,
    TableActivation,
)
from vitquant.lowering.codes import code_type, codes_of
from vitquant.lowering.context import Context, growing_shape, nothing
from vitquant.lowering.rearrangement import follow, walk
from vitquant.lowering.scaled import Masked, Powers, Scaled, Static, Term
from vitquant.program.instructions import (
    LayerNorm,
    Lookup,
    Register,
    Reshape,
    RmsNorm,
    SoftmaxToLevels,
    SoftmaxToPowers,
    smallest_type,
)


def masked(context: Context, node: Node) -> Masked:
    """Scores with a mask, which the softmax applies."""
    scores, mask = (context.value(argument) for argument in arguments(node)[:2])
    if not isinstance(scores, Scaled) or not isinstance(mask, Static):
        raise context.refuse("its mask depends on the image", "give a constant mask")
    value = arguments(node)[2]
    if not isinstance(value, int | float) or value != -math.inf:
        raise context.refuse(f"it fills with {value}, which is no mask", "fill with minus infinity before a softmax")
    shape = growing_shape(arguments(node)[1])
    if -1 in shape[1:]:
        raise context.refuse("its mask grows with the batch along another axis than the first", "repeat it there")
    # `static` has checked that such a mask repeats for each image.
    return Masked(scores, mask.value != 0, node, windows=mask.value.shape[0] if -1 in shape else None)


def on_codes(context: Context, node: Node, operation: IntegerOperation) -> Scaled:
    """The result of an operation on codes; a masked softmax gets its mask as a constant."""
    value, shape = context.value(arguments(node)[0]), growing_shape(node)
    if not isinstance(value, Masked):
        return _computed(context, node, operation, context.codes(value, "input"), None, shape)
    mask = context.constant(f"{context.site}.mask", value.mask.to(torch.int64), "u8")
    scores, shape, one = value.scores, growing_shape(value.node), context.one_image[value.node]
    if value.windows is not None:  # the batch axis holds windows: give the windows of one image an axis of their own
        apart = Reshape("", "", "", (-1, value.windows, *shape[1:]))
        scores = walk(context, scores, [apart], shape, one)
        result = _computed(context, node, operation, context.codes(scores, "input"), mask, apart.shape)
        result = walk(context, result, [Reshape("", "", "", shape)], apart.shape, (1, *one))
    else:
        result = _computed(context, node, operation, context.codes(scores, "input"), mask, shape)
    before = value.node
    for each in value.moved:
        result, before = follow(context, result, before, each), each
    return result


def _computed(
    context: Context, node: Node, operation: IntegerOperation, term: Term, mask: str | None, shape: tuple[int, ...]
) -> Scaled:
    if isinstance(operation, LogIntSoftmax):
        return _softmax_to_powers(context, operation, term, mask, shape)
    result = operation.result
    written, (low, high) = Register(code_type(result), shape), result.integer_bounds
    match operation:
        case IntegerSoftmax():
            table, (multiplier, shift) = operation.exponential, operation.steps()
            assert result.zero_point is not None
            register = context.emit(
                SoftmaxToLevels, written, input=term.register, mask=mask,
                values=context.constant(f"{context.site}.values", table.values, "u16"),
                octaves=context.constant(f"{context.site}.octaves", table.octaves, "s32"),
                multiplier=multiplier, shift=shift, result_zero=int(result.zero_point), low=low, high=high,
            )  # fmt: skip
        case IntegerLayerNorm():  # and RMSNorm
            register = _norm(context, node, operation, term, written)
        case TableActivation():
            table = result.integers(operation.table())
            register = context.emit(
                Lookup, written, input=term.register,
                table=context.constant(f"{context.site}.table", table, written.type), lowest=operation.source.spec.qmin,
            )  # fmt: skip
        case _:
            raise context.refuse("it is computed as published, with float statistics", "use the recipe fq-vit")
    return codes_of(context, register, result, len(shape))


def _softmax_to_powers(
    context: Context, operation: LogIntSoftmax, term: Term, mask: str | None, shape: tuple[int, ...]
) -> Scaled:
    """The codes of a softmax to powers: a code is scale * 2**(-code / steps), or 0."""
    powers, table = operation.powers, operation.exponential
    codes = context.emit(
        SoftmaxToPowers, Register(smallest_type(0, powers.zero_code), shape), input=term.register, mask=mask,
        values=context.constant(f"{context.site}.values", table.values, "u16"),
        octaves=context.constant(f"{context.site}.octaves", table.octaves, "s32"),
        zero=powers.zero_code, steps=powers.steps, offset=operation.offset, published=operation.published,
    )  # fmt: skip
    zero, scale = torch.tensor(powers.zero_code), powers.scale.detach().cpu().double().reshape(())
    return Scaled((Powers(codes, zero, scale, steps=powers.steps),), nothing())


def _norm(context: Context, node: Node, operation: IntegerLayerNorm, term: Term, written: Register) -> str:
    parameters = (context.static[p] if isinstance(p, Node) else None for p in arguments(node)[1:3])
    definition, source = operation.definition(written.shape[-1], *parameters), operation.source
    factors = None if source.factor is None else context.constant(f"{context.site}.factors", source.factor, "u8")
    assert source.zero_point is not None
    kind = RmsNorm if isinstance(operation, IntegerRmsNorm) else LayerNorm
    return context.emit(
        kind, written, input=term.register, factors=factors, input_zero=int(source.zero_point),
        epsilon=definition.epsilon, largest=definition.largest,
        multiplier=context.constant(f"{context.site}.multiplier", definition.affine.multiplier, "s32"),
        addend=context.constant(f"{context.site}.addend", definition.affine.addend, "s64"),
        shift=definition.affine.shift, low=definition.low, high=definition.high,
    )  # fmt: skip

"""Quantizers: where sums become codes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from vitquant.graph.operators import is_rearrangement, is_selection
from vitquant.integer.arithmetic import MULTIPLIER_BITS, rescaling
from vitquant.lowering.context import Context, Value, growing_shape, nothing
from vitquant.lowering.scaled import Joined, Scaled, Static, Term, compact, size_along
from vitquant.operations.replacement import operation_at
from vitquant.program.instructions import Concat, Register, Requantize, Reshape, smallest_type
from vitquant.quantizers import Quantizer
from vitquant.quantizers.logarithmic import Log2Quantizer
from vitquant.quantizers.quantizer import along_axis


def quantized(context: Context, node: Node, quantizer: Quantizer) -> Value:
    """The codes of what a quantizer reads."""
    source = node.all_input_nodes[0]
    if source.op == "placeholder":
        return _network_input(context, node, quantizer)
    if source not in context.dynamic:
        return _static_codes(context, str(node.target), context.static[source], quantizer)
    if operation_at(context.module, _computed(source)) is not None:
        return context.values[source]  # its codes are this quantizer's already
    return _requantized(context, context.values[source], growing_shape(node), quantizer)


def codes_of(context: Context, register: str, quantizer: Quantizer, rank: int) -> Scaled:
    """The real tensor that a register of a quantizer's codes is.

    Arguments:
        rank: the number of its axes.

    Raises:
        LoweringError: the codes are powers of two, or a scale is not positive.
    """
    if isinstance(quantizer, Log2Quantizer):
        raise context.refuse("only a softmax gives powers of two", "quantize it uniformly")
    step = quantizer.step.detach().cpu().double()
    if not bool((torch.isfinite(step) & (step > 0)).all()):
        raise context.refuse("a scale of its quantizer is not positive", "calibrate it on other images")
    assert quantizer.zero_point is not None
    zero = quantizer.zero_point.detach().cpu().to(torch.int64)
    zero, step = (along_axis(values, quantizer.spec.granularity, rank) for values in (zero, step))
    return Scaled((Term(register, zero, step),), nothing())


def code_type(quantizer: Quantizer) -> str:
    """The type of a quantizer's codes."""
    return smallest_type(quantizer.spec.qmin, quantizer.spec.qmax)


def _computed(node: Node) -> Node:
    while is_rearrangement(node) or is_selection(node):
        node = node.all_input_nodes[0]
    return node


def _network_input(context: Context, node: Node, quantizer: Quantizer) -> Scaled:
    name, shape = "input", context.one_image[node]
    context.registers[name] = Register(code_type(quantizer), (-1, *shape[1:]))
    value = codes_of(context, name, quantizer, len(shape))
    if value.terms[0].scale.numel() != 1:
        raise context.refuse("the image has several scales", "use per = tensor")
    return value


def _static_codes(context: Context, name: str, value: Tensor, quantizer: Quantizer) -> Scaled:
    with torch.inference_mode():
        codes = quantizer.encode(value.to(quantizer.scale.device))
    register = context.constant(name.removeprefix("quantizers."), codes, code_type(quantizer))
    return codes_of(context, register, quantizer, value.ndim)


def _requantized(context: Context, value: Value, shape: tuple[int, ...], quantizer: Quantizer) -> Scaled:
    """Codes of a sum: its terms rescaled and added before they are rounded once."""
    written = Register(code_type(quantizer), shape)
    match value:
        case Joined():
            parts = [_requantized(context, part, _shape_of(context, part, shape), quantizer) for part in value.parts]
            registers = tuple(part.terms[0].register for part in parts)
            joined = context.emit(Concat, written, inputs=registers, axis=value.axis)
            return codes_of(context, joined, quantizer, len(shape))
        case Static():
            return _static_codes(context, context.site, value.value, quantizer)
        case Scaled():
            pass
        case _:
            raise context.refuse("what it reads is not a sum of integers", "quantize its input")
    target = codes_of(context, "", quantizer, len(shape)).terms[0]
    multipliers, addend, shift = _integers(value, target)
    # Where the batch's axis holds heads or windows that differ, those get an axis of their own for a moment.
    axis = shape.index(-1) if -1 in shape else len(shape)
    rows = max(size_along(each, axis - len(shape)) for each in (*multipliers, addend)) if -1 in shape else 1
    inputs = tuple(term.register for term in value.terms)
    if rows > 1:
        apart = (*shape[:axis], -1, rows, *shape[axis + 1 :])
        inputs = tuple(
            context.emit(Reshape, Register(context.registers[name].type, apart), input=name, shape=apart)
            for name in inputs
        )
    output = context.emit(
        Requantize,
        Register(code_type(quantizer), apart if rows > 1 else shape),
        inputs=inputs,
        multipliers=tuple(context.constant(f"{context.site}.multiplier", m, "s32") for m in multipliers),
        addend=context.constant(f"{context.site}.addend", addend, "s64"),
        shift=shift,
        low=quantizer.spec.qmin,
        high=quantizer.spec.qmax,
    )
    if rows > 1:
        output = context.emit(Reshape, written, input=output, shape=shape)
    return Scaled((replace(target, register=output),), nothing())


def _shape_of(context: Context, part: Scaled | Static, whole: tuple[int, ...]) -> tuple[int, ...]:
    return whole if isinstance(part, Static) else context.registers[part.terms[0].register].shape


def _integers(value: Scaled, target: Term) -> tuple[list[Tensor], Tensor, int]:
    """The multiplier of each term, the addend and the shift that turn a sum into a quantizer's codes."""
    ratios = [compact(term.scale / target.scale) for term in value.terms]
    exact = value.constant / target.scale + target.zero
    offset = exact
    for term, ratio in zip(value.terms, ratios, strict=True):
        offset = offset - ratio * term.zero
    largest = torch.stack([ratio.abs().amax() for ratio in ratios])
    shift = rescaling(largest, offset.abs().amax().expand_as(largest)).shift
    most = 2.0**MULTIPLIER_BITS - 1
    multipliers = [torch.round(torch.ldexp(r, torch.tensor(shift))).clamp(-most, most).to(torch.int64) for r in ratios]
    addend = torch.round(torch.ldexp(exact.expand(offset.shape), torch.tensor(shift))).to(torch.int64)
    addend = addend + (1 << (shift - 1))
    for term, multiplier in zip(value.terms, multipliers, strict=True):
        addend = addend - multiplier * term.zero
    return multipliers, compact(addend), shift

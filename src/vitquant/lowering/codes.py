"""Lowering of quantizers, where sums are rescaled to codes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from vitquant.graph.walk import origin, path_between
from vitquant.integer.arithmetic import MULTIPLIER_BITS, rescaling, shift_left
from vitquant.integer_modules.replacement import operation_at
from vitquant.lowering.context import Context, Value, growing_shape, nothing
from vitquant.lowering.rearrangement import follow, shape_of
from vitquant.lowering.scaled import Joined, Scaled, Static, Term, compact, size_along
from vitquant.program.instructions import Concat, Lookup, Register, Requantize, Reshape, smallest_type
from vitquant.quantizers import Quantizer
from vitquant.quantizers.logarithmic import LogarithmicQuantizer
from vitquant.quantizers.quantizer import along_axis
from vitquant.quantizers.twin_uniform import TwinLevels, TwinUniformQuantizer

IMAGE = "input"  # the register that holds the codes of the images


def quantized(context: Context, node: Node, quantizer: Quantizer) -> Value:
    """The codes of a quantizer's result."""
    source = node.all_input_nodes[0]
    if source not in context.dynamic:
        static(context, node)
        return _static_codes(context, str(node.target), context.static[source], quantizer)
    made_by = origin(source)
    if made_by.op == "placeholder":
        return _of_the_image(context, made_by, source, quantizer)
    if operation_at(context.module, made_by) is not None:
        return context.value(source)  # its codes are this quantizer's already
    shape = growing_shape(node)
    target = codes_of(context, "", quantizer, len(shape)).terms[0]
    return _requantized(context, context.value(source), shape, target, quantizer)


def static(context: Context, node: Node) -> Static:
    """The value of a node that does not depend on the images, for a batch of one.

    Raises:
        LoweringError: its size grows with the batch, and it is not a repetition of the same values for each image.
    """
    one = context.static[node]
    grows = [axis for axis, size in enumerate(node.meta.get("shape", ())) if size == -1]
    if grows and not context.dynamic.isdisjoint(node.users):
        two = context.static_of_two(node)
        repeated = torch.cat([one, one], grows[0])
        if two.shape != repeated.shape or not torch.equal(two, repeated):
            reason = f"{node.name}, which no image changes, is not repeated image by image"
            raise context.refuse(reason, "give each image the same")
    return Static(one.double())


def codes_of(context: Context, register: str, quantizer: Quantizer, rank: int) -> Scaled:
    """The real tensor of a register that holds a quantizer's `integers`.

    Arguments:
        rank: the number of axes of the tensor.

    Raises:
        LoweringError: the codes are powers of two, or levels of more than 8 bits, or a scale is not positive.
    """
    if isinstance(quantizer, LogarithmicQuantizer):
        raise context.refuse("only a softmax gives powers of two", "quantize it uniformly, as +uniform-probs does")
    step = quantizer.step.detach().cpu().double()
    if not bool((torch.isfinite(step) & (step > 0)).all()):
        raise context.refuse("a scale of its quantizer is not positive", "calibrate it on other images")
    assert quantizer.zero_point is not None
    zero = quantizer.zero_point.detach().cpu().to(torch.int64)
    if isinstance(quantizer, TwinUniformQuantizer):
        bits, levels = quantizer.spec.bits, quantizer.levels
        if levels.span > 255:
            problem = f"{bits} bits of twin_uniform with shift {levels.shift} are integers up to {levels.span}"
            raise context.refuse(f"{problem}, and products are of 8 bits", "give it fewer bits or a lower shift")
        zero = -quantizer.levels.lowest.detach().cpu().to(torch.int64)
    zero, step = (along_axis(values, quantizer.spec.granularity, rank) for values in (zero, step))
    return Scaled((Term(register, zero, step),), nothing())


def code_type(quantizer: Quantizer) -> str:
    """The register type of a quantizer's `integers`."""
    return smallest_type(*quantizer.integer_bounds)


def _of_the_image(context: Context, image: Node, read: Node, quantizer: Quantizer) -> Scaled:
    """The codes of the images; rearrangements before the quantizer are applied to the codes instead."""
    shape = context.one_image[image]
    if isinstance(quantizer, TwinUniformQuantizer):
        raise context.refuse("the image has twin steps", 'give it the scheme "uniform"')
    value = codes_of(context, IMAGE, quantizer, len(shape))
    if value.terms[0].scale.numel() != 1:
        raise context.refuse("the image has several scales", "use per = tensor")
    term, known = value.terms[0], context.image
    if known is not None and (float(known.scale), int(known.zero)) != (float(term.scale), int(term.zero)):
        raise context.refuse("the image has two quantizers", "give both readers one")
    context.image = term
    context.registers[IMAGE] = Register(code_type(quantizer), (-1, *shape[1:]))
    source = image
    for step in path_between(image, read):
        value, source = follow(context, value, source, step), step
    return value


def _static_codes(context: Context, name: str, value: Tensor, quantizer: Quantizer) -> Scaled:
    with torch.inference_mode():
        codes = quantizer.encode(value.to(quantizer.scale.device)).to(torch.int64)
    register = context.constant(name.removeprefix("quantizers."), quantizer.integers(codes), code_type(quantizer))
    return codes_of(context, register, quantizer, value.ndim)


def _requantized(context: Context, value: Value, shape: tuple[int, ...], target: Term, quantizer: Quantizer) -> Scaled:
    """The codes of a sum: its terms are rescaled and added, and the sum is rounded once.

    Arguments:
        shape: of the codes.
        target: scale and zero point of the codes; its register is not used.
    """
    written, (low, high) = Register(code_type(quantizer), shape), quantizer.integer_bounds
    match value:
        case Joined():
            return _joined(context, value, shape, target, quantizer)
        case Static():
            return _static_codes(context, context.site, value.value, quantizer)
        case Scaled():
            value = context.linear(value)
        case _:
            raise context.refuse("what it reads is not a sum of integers", "quantize its input")
    if shape_of(context, value) != shape:
        raise context.refuse("it quantizes a sum that is repeated", "quantize the sum before it is repeated")
    multipliers, addend, shift = _integers(value, target)
    # Where scales differ along the batch axis, as for heads or windows in it, these get a temporary axis of their own.
    axis = shape.index(-1) if -1 in shape else len(shape)
    rows = max(size_along(each, axis - len(shape)) for each in (*multipliers, addend)) if -1 in shape else 1
    inputs = tuple(term.register for term in value.terms)
    apart = (*shape[:axis], -1, rows, *shape[axis + 1 :]) if rows > 1 else shape
    if rows > 1:
        inputs = tuple(
            context.emit(Reshape, Register(context.registers[name].type, apart), input=name, shape=apart)
            for name in inputs
        )
    output = context.emit(
        Requantize,
        Register(code_type(quantizer), apart),
        inputs=inputs,
        multipliers=tuple(context.constant(f"{context.site}.multiplier", m, "s32") for m in multipliers),
        addend=context.constant(f"{context.site}.addend", addend, "s64"),
        shift=shift,
        low=low,
        high=high,
    )
    if isinstance(quantizer, TwinUniformQuantizer):
        output = _to_levels(context, output, quantizer)
    if rows > 1:
        output = context.emit(Reshape, written, input=output, shape=shape)
    return Scaled((replace(target, register=output),), nothing())


def _to_levels(context: Context, register: str, quantizer: TwinUniformQuantizer) -> str:
    """Round integers in fine steps to the levels of twin steps by a table, the second rounding of the quantizer."""
    assert quantizer.zero_point is not None
    levels, (low, high) = TwinLevels.of(quantizer.spec, quantizer.zero_point.detach().cpu()), quantizer.integer_bounds
    if levels.lowest.numel() != 1:
        raise context.refuse("its twin steps begin elsewhere in every channel", "use per = tensor")
    every = torch.arange(low, high + 1).double()
    table = (levels.nearest(every + levels.lowest) - levels.lowest).to(torch.int64)
    written = context.registers[register]
    constant = context.constant(f"{context.site}.levels", table, written.type)
    return context.emit(Lookup, written, input=register, table=constant, lowest=low)


def _joined(context: Context, value: Joined, shape: tuple[int, ...], target: Term, quantizer: Quantizer) -> Scaled:
    """The codes of a concatenation: each part is quantized with the scales of its place, and the codes are joined."""
    axis, start, registers = value.axis, 0, []
    differs = max(size_along(target.zero, axis - len(shape)), size_along(target.scale, axis - len(shape))) > 1
    for part in value.parts:
        if differs and isinstance(part, Static):
            raise context.refuse("a constant is joined along the axis of the scales", "use per = tensor")
        whole = tuple(part.value.shape) if isinstance(part, Static) else shape_of(context, part)
        width = whole[axis]
        zero, scale = (
            v.narrow(axis - len(shape), start, width) if size_along(v, axis - len(shape)) > 1 else v
            for v in (target.zero, target.scale)
        )
        codes = _requantized(context, part, whole, replace(target, zero=zero, scale=scale), quantizer)
        registers.append(codes.terms[0].register)
        start += width
    joined = context.emit(Concat, Register(code_type(quantizer), shape), inputs=tuple(registers), axis=axis)
    return Scaled((replace(target, register=joined),), nothing())


def _integers(value: Scaled, target: Term) -> tuple[list[Tensor], Tensor, int]:
    """The multiplier of each term, the addend and the shift that rescale a sum to a quantizer's codes."""
    ratios = [compact(term.scale / target.scale) for term in value.terms]
    exact = value.constant / target.scale + target.zero
    offset = exact
    for term, ratio in zip(value.terms, ratios, strict=True):
        offset = offset - ratio * term.zero
    largest = torch.stack([ratio.abs().amax() for ratio in ratios])
    shift = rescaling(largest, offset.abs().amax().expand_as(largest)).shift
    most = 2.0**MULTIPLIER_BITS - 1
    multipliers = [torch.round(shift_left(r, shift)).clamp(-most, most).to(torch.int64) for r in ratios]
    addend = torch.round(shift_left(exact.expand(offset.shape), shift)).to(torch.int64)
    addend = addend + (1 << (shift - 1))
    for term, multiplier in zip(value.terms, multipliers, strict=True):
        addend = addend - multiplier * term.zero
    return multipliers, compact(addend), shift

"""Lowering of a quantized model to an integer program, or a refusal that names the site."""

from __future__ import annotations

import torch
from torch.fx import Node

from vitquant.autocast import in_own_precision
from vitquant.errors import LoweringError
from vitquant.graph.operators import (
    CONVOLUTIONS,
    JOINS,
    LINEAR,
    NORMS,
    PRODUCTS,
    arguments,
    aten,
    calls,
    is_rearrangement,
    is_selection,
    packet,
)
from vitquant.graph.outputs import output_names
from vitquant.graph.walk import origin
from vitquant.integer_modules.replacement import operation_at
from vitquant.lowering.affine import batch_norm, elementwise, negation
from vitquant.lowering.codes import quantized, static
from vitquant.lowering.context import SIMULATE, Context, Value, operator_name
from vitquant.lowering.on_codes import masked, on_codes
from vitquant.lowering.rearrangement import SPLITS, joined, moved
from vitquant.lowering.scaled import Term
from vitquant.lowering.sums import convolution, linear, mean, product
from vitquant.model import QuantizedModel
from vitquant.model.saved import facts
from vitquant.program.checking import check_program
from vitquant.program.instructions import IntegerProgram
from vitquant.quantizers import Quantizer

_MEANS = {aten.mean, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool1d}
_CASTS = {aten.to, aten._to_copy, aten.type_as}
_IN_ORDER = {aten.mul, aten.div, aten.add, aten.sub}


@in_own_precision
def lower(model: QuantizedModel) -> IntegerProgram:
    """Turn a quantized model into an integer program that computes its codes without floating point.

    Arguments:
        model: calibrated, with every operation computed in integers, as by the recipe `fq-vit`.

    Raises:
        CalibrationError: a quantizer is missing.
        LoweringError: an operation cannot be computed in integers, or could overflow; the message names the site, the
            reason and what to do.

    Pitfall: codes differ from the simulation's where float32 and integers round a sum differently; `parity` counts
        such codes.
    """
    program = translate(model)
    check_program(program)
    return program


def translate(model: QuantizedModel) -> IntegerProgram:
    """The integer program of a quantized model, before it is proved to be free of overflow.

    Raises:
        CalibrationError: a quantizer is missing.
        LoweringError: an operation cannot be computed in integers.
    """
    model.require_calibrated()
    try:
        return _program(model)
    except LoweringError as error:
        left = [name for name, assignment in model.assignments.items() if assignment.spec is None]
        if not left or model.arithmetic is not None:
            raise
        raise LoweringError(
            f"{error}; the recipe leaves {len(left)} operands in float, first {left[0]}: lay +fully-integer over it"
        ) from None


def _program(model: QuantizedModel) -> IntegerProgram:
    context = Context(model)
    for node in model.graph_module.graph.nodes:
        lower_node(context, node)
    return program_of(context)


def lower_node(context: Context, node: Node) -> None:
    """Lower a node, after those that it reads: its value is in `context.values`, where it has one.

    Raises:
        LoweringError: it cannot be computed in integers.
    """
    context.enter(node)
    if node.op in ("placeholder", "output"):
        return  # the images are lowered at their quantizers, results when all nodes are
    if (quantizer := _quantizer(context, node)) is not None:
        known = context.image
        context.values[node] = quantized(context, node, quantizer)
        context.codes(context.values[node], "result")
        if known is None and context.image is not None:
            context.image_quantizer = quantizer
    elif node not in context.dynamic:
        if node in context.static:
            context.values[node] = static(context, node)
    elif origin(node).op == "placeholder" or 0 in context.one_image.get(node, ()):
        pass  # moves of the images are lowered at their quantizer, and empty tensors need no registers
    elif node in context.one_image or node.meta.get("shapes"):
        context.values[node] = _lowered(context, node)


def program_of(context: Context) -> IntegerProgram:
    """The program of a model all of whose nodes are lowered.

    Raises:
        LoweringError: the image is not quantized, or an output has no integers.
    """
    nodes = list(context.module.graph.nodes)
    context.enter(nodes[-1])
    results = _results(context, nodes[-1])
    if context.image is None or context.image_quantizer is None:
        raise context.refuse("the image is not quantized", "let the recipe quantize it")
    quantizers = [node for node in nodes if _quantizer(context, node) is not None]
    spec = context.image_quantizer.spec
    return IntegerProgram(
        input=context.image.register,
        outputs={name: result.register for name, result in results.items()},
        registers=context.registers,
        constants=context.constants,
        instructions=tuple(context.instructions),
        codes={
            str(node.target).removeprefix("quantizers."): context.codes(context.values[node], "result").register
            for node in quantizers
        },
        facts={
            "input": {
                "scale": float(context.image.scale),
                "zero_point": int(context.image.zero),
                "low": spec.qmin,
                "high": spec.qmax,
            },
            "outputs": {
                name: {"scale": result.scale.flatten().tolist(), "zero_point": int(result.zero)}
                for name, result in results.items()
            },
            **facts(context.model),
        },
    )


def _lowered(context: Context, node: Node) -> Value:
    """The lowered value of an operation that depends on the images."""
    operation = operation_at(context.module, node)
    if operation is not None:
        return on_codes(context, node, operation)
    if calls(node, LINEAR):
        return linear(context, node)
    if calls(node, CONVOLUTIONS):
        return convolution(context, node)
    if calls(node, PRODUCTS):
        return product(context, node)
    if calls(node, _IN_ORDER):
        return elementwise(context, node)
    if calls(node, {aten.neg}):
        return negation(context, node)
    if calls(node, {aten.batch_norm}):
        return batch_norm(context, node)
    if calls(node, {aten.masked_fill}):
        return masked(context, node)
    if calls(node, _MEANS):
        return mean(context, node)
    if calls(node, JOINS):
        return joined(context, node)
    if calls(node, _CASTS) and node.meta["dtype"] in (torch.float32, torch.float64):
        return context.value(arguments(node)[0])
    if calls(node, SPLITS):
        return ()  # its parts are lowered one by one
    if is_rearrangement(node) or is_selection(node):
        return moved(context, node)
    raise _no_integers(context, node)


def _no_integers(context: Context, node: Node) -> Exception:
    reason = context.model.float_reasons.get(context.site)
    if reason is not None and context.model.arithmetic is not None:
        return context.refuse(f"it stays in float: {reason}")
    if context.model.arithmetic is None and node.name in {site.node for site in context.model.sites}:
        remedy = f"use a recipe that computes on codes, such as fq-vit, or {SIMULATE}"
        return context.refuse(f"the recipe {context.model.recipe.name} computes it in float", remedy)
    kind = NORMS.get(packet(node), operator_name(node))
    return context.refuse(f"{kind} has no integer form")


def _results(context: Context, node: Node) -> dict[str, Term]:
    """The outputs of the model, by name."""
    results = zip(output_names(context.module), arguments(node)[0], strict=True)
    found = {name: result for name, result in results if isinstance(result, Node)}
    return {name: _result(context, name, result) for name, result in found.items()}


def _result(context: Context, name: str, node: Node) -> Term:
    if node not in context.dynamic or not node.meta["dtype"].is_floating_point:
        raise context.refuse(f"{name} is no float tensor that is computed from the image", "let the model not give it")
    if node.meta["shape"][:1] != (-1,) or context.one_image[node][:1] != (1,):
        raise context.refuse(f"the first axis of {name} is not the images", "let the model give it so that it is")
    term = context.term(node, "result")
    context.zero(term, "result")
    if context.image is not None and term.register == context.image.register:
        raise context.refuse(f"{name} is the image itself", "let the model not give it")
    if term.scale.numel() > 1 and term.scale.numel() != term.scale.shape[-1]:
        raise context.refuse(f"{name} has scales along another axis than its last", "let the recipe quantize it")
    return term


def _quantizer(context: Context, node: Node) -> Quantizer | None:
    called = context.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return called if isinstance(called, Quantizer) else None

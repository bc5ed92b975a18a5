"""Replace float operations of a graph by integer ones."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from vitquant.errors import LoweringError
from vitquant.graph.kinds import KINDS, IntegerForm
from vitquant.graph.masks import mask_exactly, masks_between, masks_whole_rows, unmasked
from vitquant.graph.operators import arguments, aten, calls, is_rearrangement, is_selection, packet
from vitquant.graph.sites import Site
from vitquant.graph.walk import ancestors, depends_on_input, nodes_by_name, origin, path_between, root
from vitquant.integer.softmax import LONGEST_ROW
from vitquant.integer_modules.activation import Elementwise, TableActivation
from vitquant.integer_modules.arithmetic import Arithmetic
from vitquant.integer_modules.layer_norm import IntegerLayerNorm, PublishedLayerNorm
from vitquant.integer_modules.operation import IntegerOperation, NotIntegerError
from vitquant.integer_modules.rms_norm import IntegerRmsNorm
from vitquant.integer_modules.softmax import IntegerSoftmax, LogIntSoftmax, PublishedLogIntSoftmax
from vitquant.quantizers import Quantizer
from vitquant.quantizers.logarithmic import LogarithmicQuantizer
from vitquant.quantizers.quantizer import channel_axis

ROOT = "operations"


def replace_operations(module: GraphModule, sites: Iterable[Site], arithmetic: Arithmetic) -> dict[str, str]:
    """Compute every softmax, LayerNorm and activation on codes, where its quantizers allow it.

    Arguments:
        module: the graph, with its quantizers; changed in place, and must be recompiled.
        sites: all sites of the graph.
        arithmetic: how each kind is computed.

    Returns:
        The reason for each site that stays in float, by its name.
    """
    nodes = nodes_by_name(module.graph)
    refused: dict[str, str] = {}
    for site in sites:
        if KINDS[site.kind].form is not IntegerForm.ON_CODES:
            continue
        node = nodes[site.node]
        try:  # find every obstacle before the graph is changed
            readers = _readers_by_result(module, node)
            built = [_build(module, site.kind, node, result, arithmetic) for result in readers]
        except NotIntegerError as reason:
            refused[site.name] = str(reason)
            continue
        if site.kind == "softmax":
            for mask in _masks(module, node):
                mask_exactly(module, mask)
        parts = [node, *(_copy_for(module, node, users) for users in list(readers.values())[1:])]
        for number, (part, (operation, parameters)) in enumerate(zip(parts, built, strict=True)):
            target = f"{ROOT}.{site.name}" + (f"_part{number}" if number else "")
            module.add_submodule(target, operation)
            part.op, part.target, part.args, part.kwargs = "call_module", target, (arguments(part)[0], *parameters), {}
    module.graph.lint()
    return refused


def reconnect_operations(module: GraphModule) -> None:
    """Connect every integer operation with the current quantizers of its input and result.

    Raises:
        LoweringError: an operation cannot be computed in integers with them.
    """
    for node in module.graph.nodes:
        operation = operation_at(module, node)
        if operation is None:
            continue
        try:
            operation.connect(_source(module, node), _result(module, node))
        except NotIntegerError as reason:
            name = str(node.target).removeprefix(f"{ROOT}.")
            raise LoweringError(f"{name} is computed on codes, but {reason}; quantize it in another way") from None


def prepare_operations(module: GraphModule) -> None:
    """Let every integer operation derive its constants from its current quantizers and parameters.

    Operations whose parameters depend on the image are left out; they derive their constants at every call.
    """
    of_the_image = depends_on_input(module.graph)
    for node in module.graph.nodes:
        operation = operation_at(module, node)
        if operation is not None and of_the_image.isdisjoint(node.all_input_nodes[1:]):
            parameters = (_stored(module, parameter) for parameter in node.args[1:])
            operation.prepare(node.meta["shape"][-1], *parameters)


def _stored(module: GraphModule, node: Any) -> Any:
    """The value of a node that does not depend on the image; other objects are returned as they are."""
    if not isinstance(node, Node):
        return node
    if node.op == "get_attr":
        return attrgetter(str(node.target))(module)
    given, keywords = (map_arg(found, partial(_stored, module)) for found in (node.args, node.kwargs))
    called: Any = module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    return called(*given, **keywords)  # type: ignore[arg-type]


def operation_at(module: GraphModule, node: Node) -> IntegerOperation | None:
    """The integer operation that a node calls, or None."""
    called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return called if isinstance(called, IntegerOperation) else None


def _build(
    module: GraphModule, kind: str, node: Node, result: Quantizer, arithmetic: Arithmetic
) -> tuple[IntegerOperation, tuple[Any, ...]]:
    """The operation for a node and one quantizer of its result, and the nodes of its parameters."""
    if getattr(arithmetic, kind) == "float":
        raise NotIntegerError("the recipe computes it in float")
    source = _source(module, node)
    match kind:
        case "softmax":
            return _softmax(node, source, result, arithmetic, _is_masked(module, node)), ()
        case "layer_norm":
            given = dict(zip(("shape", "weight", "bias", "epsilon"), arguments(node)[1:], strict=False))
            if not calls(node, {aten.layer_norm}) or len(given["shape"]) != 1:
                raise NotIntegerError("it normalizes other than the last axis")
            form = PublishedLayerNorm if arithmetic.layer_norm == "published" else IntegerLayerNorm
            return form(source, result, given.get("epsilon", 1e-5)), (given.get("weight"), given.get("bias"))
        case "rms_norm":
            given = dict(zip(("shape", "weight", "epsilon"), arguments(node)[1:], strict=False))
            if len(given["shape"]) != 1:
                raise NotIntegerError("it normalizes other than the last axis")
            epsilon = given.get("epsilon")  # torch's default is the eps of the dtype
            epsilon = torch.finfo(node.meta["dtype"]).eps if epsilon is None else epsilon
            return IntegerRmsNorm(source, result, epsilon), (given.get("weight"),)
        case _:
            if node.all_input_nodes[1:]:
                raise NotIntegerError("it has parameters")
            function = Elementwise(str(node.target), arguments(node)[1:], dict(node.kwargs))
            return TableActivation(source, result, function), ()


def _readers_by_result(module: GraphModule, node: Node) -> dict[Quantizer, list[Node]]:
    """The quantizers of a node's result, each with the direct readers of the node that lead to it.

    There is usually one. A model with two heads reads one token of its last LayerNorm in each, with a quantizer of its
    own.
    """
    found: dict[Quantizer, list[Node]] = {}
    for user in node.users:
        found.setdefault(_result_through(module, user), []).append(user)
    if not found:
        raise NotIntegerError("nothing reads its result")
    return found


def _copy_for(module: GraphModule, node: Node, users: Iterable[Node]) -> Node:
    """Insert a copy of a node, which the given users read instead."""
    with module.graph.inserting_after(node):
        copy = module.graph.node_copy(node)
    for user in users:
        user.replace_input_with(node, copy)
    return copy


def _softmax(
    node: Node, source: Quantizer, result: Quantizer, arithmetic: Arithmetic, masked: bool
) -> IntegerOperation:
    if arguments(node)[1] not in (-1, len(node.meta["shape"]) - 1):
        raise NotIntegerError("it does not run over the last axis")
    if node.meta["shape"][-1] > LONGEST_ROW:
        raise NotIntegerError(f"its rows have {node.meta['shape'][-1]} entries: sums are proved up to {LONGEST_ROW}")
    if isinstance(result, LogarithmicQuantizer):
        form = PublishedLogIntSoftmax if arithmetic.softmax == "published" else LogIntSoftmax
        return form(source, result, arithmetic.exponential, masked)
    if arithmetic.softmax == "published":
        raise NotIntegerError("the published code keeps softmax in float where probabilities are no powers of two")
    return IntegerSoftmax(source, result, arithmetic.exponential, masked)


def _scores(module: GraphModule, node: Node) -> Node:
    """The node of the quantizer that a softmax reads, before rearrangements and masks."""
    return root(unmasked(module, arguments(node)[0]))


def _masks(module: GraphModule, node: Node) -> list[Node]:
    """The nodes that mask the scores of a softmax."""
    return masks_between(module, _scores(module, node), arguments(node)[0])


def _is_masked(module: GraphModule, node: Node) -> bool:
    """Whether the scores of a softmax are masked; masks that cover a whole row are refused."""
    masks = [arguments(mask)[1] for mask in _masks(module, node)]
    read = ancestors(module.graph)
    images = next(read[each] for each in module.graph.nodes if each.op == "placeholder")
    known = [mask for mask in masks if not read[mask] & images]  # the others depend at least on the batch size
    if masks_whole_rows([_stored(module, mask) for mask in known]):
        raise NotIntegerError("its mask covers every entry of a row: give every row at least one that is not masked")
    return bool(masks)


def _source(module: GraphModule, node: Node) -> Quantizer:
    """The quantizer of a node's input."""
    read = origin(_scores(module, node))
    quantizer = _quantizer_at(module, read)
    if quantizer is None:
        raise NotIntegerError("its input is in float")
    if channel_axis(quantizer.spec.granularity) is not None and not _keeps_channels(read, arguments(node)[0]):
        raise NotIntegerError("its input's scales are those of other channels: it reads a part or a rearrangement")
    return quantizer


def _keeps_channels(source: Node, read: Node) -> bool:
    """Whether the last axis of `read` is the last axis of `source`, complete and in the same order."""
    return all(_keeps_last_axis(step) for step in path_between(source, read))


def _keeps_last_axis(step: Node) -> bool:
    before, after = step.all_input_nodes[0].meta.get("shape"), step.meta.get("shape")
    if not before or not after or before[-1] != after[-1]:
        return False
    last, rest = len(before) - 1, arguments(step)[1:]
    match packet(step):
        case aten.permute:
            return rest[0][-1] % len(before) == last
        case aten.transpose:
            return last not in (rest[0] % len(before), rest[1] % len(before))
        case aten.select | aten.slice:
            return (rest[0] if rest else 0) % len(before) != last
        case aten.roll | aten.flip:
            return bool(rest[-1]) and all(axis % len(before) != last for axis in rest[-1])
        case aten.pad | aten.constant_pad_nd:
            return tuple(rest[0][:2]) == (0, 0)
        case _:
            return calls(
                step, {aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten, aten.unsqueeze}
            )


def _result(module: GraphModule, node: Node) -> Quantizer:
    """The single quantizer of a node's result; more than one is refused."""
    found = list(_readers_by_result(module, node))
    if len(found) != 1:
        raise NotIntegerError("its result has several quantizers")
    return found[0]


def _result_through(module: GraphModule, user: Node) -> Quantizer:
    """The quantizer that `user` calls, or, if it rearranges or selects, the single quantizer of its result."""
    quantizer = _quantizer_at(module, user)
    if quantizer is not None:
        return quantizer
    if is_rearrangement(user) or is_selection(user):
        quantizer = _result(module, user)
        if channel_axis(quantizer.spec.granularity) is not None and not _keeps_last_axis(user):
            raise NotIntegerError("its result's scales are those of other channels, of a part or a rearrangement")
        return quantizer
    raise NotIntegerError("its result is read in float")


def _quantizer_at(module: GraphModule, node: Node) -> Quantizer | None:
    called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return called if isinstance(called, Quantizer) else None

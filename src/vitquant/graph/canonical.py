"""One canonical form for each computation: libraries write the same computation in different ways.

Each rewrite preserves the function (to the rounding of a reordered product) and keeps the metadata
that `sites` reads: `shape` with -1 for a size that grows with the batch, `dtype`, `module`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from vitquant.errors import CaptureError
from vitquant.graph.einsum import einsum_to_matmul
from vitquant.graph.masks import is_mask, masked_by_infinity
from vitquant.graph.operators import PRODUCTS, arguments, aten, calls, is_rearrangement, packet
from vitquant.graph.rms_norm import name_rms_norms
from vitquant.graph.walk import depends_on_input, root

_LAST = 2**62  # `slice` writes "to the end" as the largest 64-bit integer


def canonicalize(module: GraphModule) -> None:
    """Bring a captured graph to canonical form, in place.

    After it, attention is product, scale, mask, softmax, product; the scale of attention is applied to the
    scores, not to query or key; every matrix product is `linear` or `matmul`; no-ops are removed.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if calls(node, {aten.scaled_dot_product_attention}):
            _decompose_attention(module, node)
        elif calls(node, {aten.bmm}):
            node.target = aten.matmul.default
        elif calls(node, {aten.addmm}):
            _addmm_to_linear(node)
        elif calls(node, {aten.baddbmm}):
            _decompose_baddbmm(node)
        elif calls(node, {aten.einsum}):
            einsum_to_matmul(node)
        elif calls(node, {aten._native_batch_norm_legit_no_training}):
            _single_output_batch_norm(node)
        elif _overwrites(node):
            node.replace_all_uses_with(arguments(node)[1])
            graph.erase_node(node)
        elif _does_nothing(node):
            node.replace_all_uses_with(arguments(node)[0])
            graph.erase_node(node)
    name_rms_norms(module)
    dynamic = depends_on_input(graph)
    for node in list(graph.nodes):
        if calls(node, PRODUCTS):
            _scale_after_product(graph, node)
        elif calls(node, {aten.add}) and not node.kwargs and isinstance(arguments(node)[1], Node):
            left, right = arguments(node)
            if left not in dynamic and right in dynamic:
                left, right = node.args = (right, left)  # the data is the left operand
            bias, *mask = _summands(module, right)
            same = isinstance(left, Node) and left.meta["shape"] == node.meta["shape"]  # the data is not broadcast
            if left in dynamic and same and mask and is_mask(module, mask[0]):
                with graph.inserting_before(node):
                    biased = _emit(graph, node, aten.add.Tensor, (left, bias))
                node.args = (biased, mask[0])
                _fill_with_infinity(module, biased)  # the bias may be another mask
            else:
                _fill_with_infinity(module, node)
    for node in list(graph.nodes):
        if calls(node, {aten.view, aten._unsafe_view}):
            # A view of a tensor that is no longer contiguous, now that copies are gone, needs reshape.
            node.target = aten.reshape.default
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()


def _fill_with_infinity(module: GraphModule, node: Node) -> None:
    """Rewrite scores plus a mask of zeros and minus infinity as `masked_fill`; leave other additions as they are."""
    left, right = arguments(node)
    for scores, mask in ((left, right), (right, left)):
        if isinstance(scores, Node) and isinstance(mask, Node) and scores.meta["shape"] == node.meta["shape"]:
            masked = masked_by_infinity(module, mask)
            if masked is not None:
                node.target, node.args = aten.masked_fill.Scalar, (scores, masked, -math.inf)
                return


def _emit(
    graph: Graph, like: Node, target: Callable[..., Any], args: tuple[Any, ...], shape: tuple[int, ...] | None = None
) -> Node:
    """A new call with the metadata of `like`: its module, its dtype, and its shape unless another is given."""
    node = graph.call_function(target, args)
    node.meta = {**like.meta, "shape": like.meta["shape"] if shape is None else shape}
    return node


def _decompose_attention(module: GraphModule, node: Node) -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, arguments(node), strict=False)), **node.kwargs}
    query, key, value = given["query"], given["key"], given["value"]
    if given.get("enable_gqa") and query.meta["shape"][-3] != key.meta["shape"][-3]:
        where = f"{node.meta['module']}: " if node.meta["module"] else ""
        raise CaptureError(f"{where}grouped-query attention is not supported; repeat the key heads")
    graph, width = module.graph, query.meta["shape"][-1]
    scale = given.get("scale")
    scale = 1 / math.sqrt(width) if scale is None else scale
    scores_shape = (*query.meta["shape"][:-1], key.meta["shape"][-2])
    swapped = (*key.meta["shape"][:-2], key.meta["shape"][-1], key.meta["shape"][-2])
    with graph.inserting_before(node):
        transposed = _emit(graph, key, aten.transpose.int, (key, -2, -1), swapped)
        transposed.meta["module"] = node.meta["module"]
        scores = _emit(graph, node, aten.matmul.default, (query, transposed), scores_shape)
        scores = _emit(graph, node, aten.mul.Tensor, (scores, scale), scores_shape)
        mask = given.get("attn_mask")
        if given.get("is_causal"):
            mask = _causal_mask(module, node, scores_shape)
        if mask is not None and not _masks_nothing(module, mask):
            scores = _add_mask(module, node, scores, mask, scores_shape)
        probs = _emit(graph, node, aten.softmax.int, (scores, -1), scores_shape)
        context = _emit(graph, node, aten.matmul.default, (probs, value))
    node.replace_all_uses_with(context)
    graph.erase_node(node)


def _add_mask(module: GraphModule, like: Node, scores: Node, mask: Node, shape: tuple[int, ...]) -> Node:
    graph = module.graph
    if mask.meta["dtype"] is not torch.bool:
        for part in _summands(module, mask):
            scores = _emit(graph, like, aten.add.Tensor, (scores, part), shape)
        return scores
    masked = _emit(graph, mask, aten.logical_not.default, (mask,))
    return _emit(graph, like, aten.masked_fill.Scalar, (scores, masked, -math.inf), shape)


def _summands(module: GraphModule, mask: Node) -> list[Node]:
    """The terms of an attention mask that a library made by adding a position bias and a mask: bias first, then mask.

    Apart, the bias can be quantized as a part of the scores, and the mask stays out of every range of values. Anything
    but a sum of two tensors is returned as the only term.
    """
    if not calls(mask, {aten.add}) or mask.kwargs or not all(isinstance(part, Node) for part in arguments(mask)):
        return [mask]
    left, right = arguments(mask)
    return [right, left] if is_mask(module, left) else [left, right]


def _causal_mask(module: GraphModule, node: Node, shape: tuple[int, ...]) -> Node:
    name = f"causal_mask_{shape[-2]}x{shape[-1]}"
    if not hasattr(module, name):
        module.register_buffer(name, torch.ones(shape[-2:], dtype=torch.bool).tril(), persistent=False)
    mask = module.graph.get_attr(name)
    mask.meta = {**node.meta, "shape": shape[-2:], "dtype": torch.bool}
    return mask


def _masks_nothing(module: GraphModule, mask: Node) -> bool:
    """Whether a mask is a folded constant that lets every score through (transformers makes one per forward)."""
    while calls(mask, {aten.expand, aten.unsqueeze, aten.view}):
        mask = mask.all_input_nodes[0]
    if mask.op != "get_attr" or not str(mask.target).startswith("constant_"):
        return False
    value = getattr(module, str(mask.target))
    return bool(value.all()) if value.dtype is torch.bool else not bool(value.any())


def _addmm_to_linear(node: Node) -> None:
    bias, left, right = arguments(node)
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
        return
    graph = node.graph
    with graph.inserting_before(node):
        shape = right.meta["shape"]
        weight = _emit(graph, right, aten.transpose.int, (right, 0, 1), (shape[1], shape[0]))
        # (W^T)^T is W: a linear layer written as addmm usually has its weight transposed already.
        if calls(right, {aten.t, aten.transpose}) and arguments(right)[0].op == "get_attr":
            graph.erase_node(weight)
            weight = arguments(right)[0]
    node.target, node.args, node.kwargs = aten.linear.default, (left, weight, bias), {}


def _decompose_baddbmm(node: Node) -> None:
    graph, (added, left, right) = node.graph, arguments(node)
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    with graph.inserting_before(node):
        result = _emit(graph, node, aten.matmul.default, (left, right))
        if alpha != 1:
            result = _emit(graph, node, aten.mul.Tensor, (result, alpha))
        if beta != 0:
            if beta != 1:
                added = _emit(graph, added, aten.mul.Tensor, (added, beta))
            result = _emit(graph, node, aten.add.Tensor, (result, added))
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _single_output_batch_norm(node: Node) -> None:
    """Replace the functional batch norm, which also returns saved statistics that evaluation never reads."""
    source, weight, bias, mean, variance, momentum, epsilon = arguments(node)
    for user in [user for user in node.users if arguments(user)[1] == 0]:
        with node.graph.inserting_before(user):
            call = (source, weight, bias, mean, variance, False, momentum, epsilon, False)
            result = _emit(node.graph, user, aten.batch_norm.default, call)
            result.meta["module"] = node.meta["module"]
        user.replace_all_uses_with(result)
        node.graph.erase_node(user)


def _does_nothing(node: Node) -> bool:
    """Whether the node gives its first argument unchanged."""
    if node.op != "call_function" or not arguments(node) or not isinstance(arguments(node)[0], Node):
        return False
    source = arguments(node)[0]
    same = node.meta.get("shape") == source.meta.get("shape") and node.meta.get("dtype") == source.meta.get("dtype")
    if not same or node.meta.get("shape") is None:
        return False
    match packet(node):
        case aten.clone | aten.contiguous | aten.detach | aten.alias | aten.lift_fresh_copy:
            return True
        case aten.dropout:
            return node.args[2] is False
        case aten._to_copy | aten.to:
            return "device" not in node.kwargs or node.kwargs["device"] is None
        case aten.slice:
            return _takes_all(*arguments(node))
        case aten.pad | aten.constant_pad_nd:
            return all(isinstance(size, int) and size == 0 for size in arguments(node)[1])
        case aten.roll:
            return all(shift == 0 for shift in arguments(node)[1])
        case aten.expand:
            return all(size == -1 or isinstance(size, int) for size in arguments(node)[1])
        case _:
            return False


def _overwrites(node: Node) -> bool:
    """Whether the node gives its second argument unchanged: `x[:] = y`, written functionally."""
    if not calls(node, {aten.copy, aten.slice_scatter}) or not isinstance(arguments(node)[1], Node):
        return False
    target, source, *rest = arguments(node)
    same = node.meta.get("shape") == source.meta.get("shape") and node.meta.get("dtype") == source.meta.get("dtype")
    return same and (packet(node) is aten.copy or _takes_all(target, *rest))


def _takes_all(source: Node, axis: int = 0, start: object = None, stop: object = None, step: int | None = None) -> bool:
    """Whether a slice takes the whole tensor; along the batch the size, -1, is unknown and cannot show it."""
    size = source.meta["shape"][axis]
    reaches_end = stop is None or (isinstance(stop, int) and (stop >= _LAST or (size != -1 and stop >= size)))
    return start in (0, None) and step in (1, None) and reaches_end


def _scale_after_product(graph: Graph, product: Node) -> None:
    """Move a constant factor of an operand to the product's result, so that `query` is unscaled in every model."""
    factor = 1.0
    for index in (0, 1):
        operand = arguments(product)[index]
        scaled = root(operand)
        constant = _constant_factor(scaled)
        if constant is None or not _only_reader_chain(operand, scaled):
            continue
        scaled.replace_all_uses_with(arguments(scaled)[0])
        graph.erase_node(scaled)
        factor *= constant
    if factor != 1.0:
        with graph.inserting_after(product):
            scaled = _emit(graph, product, aten.mul.Tensor, (product, factor))
        product.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


def _constant_factor(node: Node) -> float | None:
    if calls(node, {aten.mul, aten.div}) and isinstance(arguments(node)[1], int | float) and not node.kwargs:
        return float(arguments(node)[1]) if packet(node) is aten.mul else 1.0 / arguments(node)[1]
    return None


def _only_reader_chain(operand: Node, source: Node) -> bool:
    """Whether `operand` is `source`, perhaps rearranged, and nothing else reads it on the way."""
    node = operand
    while node is not source:
        if len(node.users) != 1 or not is_rearrangement(node):
            return False
        node = node.all_input_nodes[0]
    return len(source.users) == 1

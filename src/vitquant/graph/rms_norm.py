"""Rewrite an RMSNorm that a library computes step by step as the single operator `rms_norm`."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from vitquant.graph.operators import arguments, aten, calls
from vitquant.graph.stored import stored


def name_rms_norms(module: GraphModule) -> None:
    """Write `weight * (x * rsqrt(mean(x**2) + epsilon))` as one `rms_norm`, in place.

    Models of transformers compute it so (AIMv2, InternViT, Qwen2.5-VL's encoder). It is left as it is where the mean is
    not over the last axis, or where something else reads an intermediate result.
    """
    for node in list(module.graph.nodes):
        found = _divided(node)
        if found is None:
            continue
        x, epsilon = found
        weighted = _weighted(module, node, x.meta["shape"][-1])
        last, weight = weighted or (node, None)
        with module.graph.inserting_before(last):
            norm = module.graph.call_function(
                aten.rms_norm.default,
                (x, [x.meta["shape"][-1]], weight, epsilon),  # type: ignore[arg-type]
            )
        norm.meta = dict(last.meta)
        last.replace_all_uses_with(norm)


def _divided(node: Node) -> tuple[Node, float] | None:
    """The x and the epsilon of a node that computes x / sqrt(mean(x**2) + epsilon); None for other nodes."""
    if not calls(node, {aten.mul}) or len(node.all_input_nodes) != 2:
        return None
    for x, root in (arguments(node)[:2], arguments(node)[1::-1]):
        epsilon = _epsilon(root, x)
        if epsilon is not None and x.meta["shape"] == node.meta["shape"]:
            return x, epsilon
    return None


def _epsilon(root: Node, x: Node) -> float | None:
    """Epsilon, where a node is 1 / sqrt(mean(x**2) + epsilon) over the last axis, which nothing else reads."""
    if not calls(root, {aten.rsqrt}) or len(root.users) != 1:
        return None
    total = arguments(root)[0]
    if not calls(total, {aten.add}) or len(total.users) != 1 or total.kwargs:
        return None
    mean, epsilon = arguments(total)[:2]
    if not calls(mean, {aten.mean}) or not isinstance(epsilon, float) or len(mean.users) != 1:
        return None
    squares, axes, *keep = arguments(mean)
    rank = len(x.meta["shape"])
    if [axis % rank for axis in axes] != [rank - 1] or keep[:1] != [True] or len(squares.users) != 1:
        return None
    squared = calls(squares, {aten.pow}) and arguments(squares) == (x, 2)
    multiplied = calls(squares, {aten.mul}) and arguments(squares) == (x, x)
    return epsilon if squared or multiplied or (calls(squares, {aten.square}) and arguments(squares) == (x,)) else None


def _weighted(module: GraphModule, node: Node, width: int) -> tuple[Node, Node] | None:
    """The product of a node with a stored gain, which alone reads it, and the gain."""
    users = list(node.users)
    if len(users) != 1 or not calls(users[0], {aten.mul}):
        return None
    for other in users[0].all_input_nodes:
        gain = stored(module, other)
        if other is not node and other.op == "get_attr" and gain is not None and tuple(gain.shape) == (width,):
            return users[0], other
    return None

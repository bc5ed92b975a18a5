"""Attention that one operator computes as a whole, so that nothing inside of it can be quantized."""

from __future__ import annotations

import re

from torch.fx import Graph, Node

from vitquant.graph.operators import PRODUCTS, calls
from vitquant.graph.walk import depends_on_input

_ATTENTION = re.compile(r"attention|attn|flash|sdpa|sdp_|mha|multi_?head|transformer_(en|de)coder", re.IGNORECASE)
_OF_TORCH = ("aten", "prims", "prim", "torchvision", "higher_order")
_ADVICE = (
    "write it with torch.nn.functional.scaled_dot_product_attention or plain products "
    '(timm.layers.set_fused_attn(False); transformers: attn_implementation="sdpa" or "eager")'
)


def fused_attention(graph: Graph) -> str | None:
    """Why a captured graph holds attention that cannot be looked into, and what to do; None when it does not.

    An operator is taken for attention when its name says so, when somebody else than torch defines it and it reads
    three tensors of the input or more (query, key and value), or when it is theirs and the graph has no product of
    activations beside it.

    Arguments:
        graph: in canonical form, where `scaled_dot_product_attention` is its parts.
    """
    dynamic = depends_on_input(graph)
    foreign = []
    for node in graph.nodes:
        if node.op != "call_function" or node not in dynamic:
            continue
        if _ATTENTION.search(_name(node)):
            return f"{_where(node)}attention is one fused operator, {_name(node)}: {_ADVICE}"
        if _is_foreign(node):
            foreign.append(node)
            if len(dynamic.intersection(node.all_input_nodes)) >= 3:
                return f"{_where(node)}{_name(node)} may be attention in one fused operator: {_ADVICE}"
    if foreign and not any(calls(node, PRODUCTS) for node in graph.nodes):
        node = foreign[0]
        return f"{_where(node)}the model's attention must be within {_name(node)}, one fused operator: {_ADVICE}"
    return None


def _name(node: Node) -> str:
    """`namespace.operator`, without the overload."""
    packet = getattr(node.target, "overloadpacket", node.target)
    name = getattr(packet, "_qualified_op_name", None)
    return name.replace("::", ".") if name else getattr(node.target, "__name__", str(node.target))


def _is_foreign(node: Node) -> bool:
    namespace = getattr(node.target, "namespace", None)
    return namespace is not None and namespace not in _OF_TORCH


def _where(node: Node) -> str:
    module = node.meta.get("module")
    return f"{module}: " if module else ""

"""Fused attention: one operator computes it as a whole, so that nothing inside it can be quantized."""

from __future__ import annotations

import re

from torch._subclasses.fake_tensor import UnsupportedOperatorException
from torch.fx import Graph, Node

from vitquant.graph.operators import PRODUCTS, aten, calls
from vitquant.graph.walk import depends_on_input

_ATTENTION = re.compile(r"attention|attn|flash|sdpa|sdp_|mha|multi_?head|transformer_(en|de)coder", re.IGNORECASE)
_OF_TORCH = ("aten", "prims", "prim", "torchvision", "higher_order")
_ADVICE = (
    "write it with torch.nn.functional.scaled_dot_product_attention or plain products "
    '(timm.layers.set_fused_attn(False); transformers: attn_implementation="sdpa" or "eager")'
)


def fused_attention(graph: Graph) -> str | None:
    """The message for a captured graph with fused attention: which operator, and what to do; None where there is none.

    An operator is taken for attention when its name says so; when it is a custom operator (not of torch or
    torchvision) that reads at least three tensors that depend on the input (query, key and value); or when it is a
    custom operator in a graph without a product of activations.

    Arguments:
        graph: in canonical form, where `scaled_dot_product_attention` has been decomposed.
    """
    if named := named_attention(graph):
        return named
    dynamic = depends_on_input(graph)
    foreign = []
    for node in graph.nodes:
        if node in dynamic and _is_foreign(node):
            foreign.append(node)
            if len(dynamic.intersection(node.all_input_nodes)) >= 3:
                return f"{_where(node)}{_name(node)} may be attention in one fused operator: {_ADVICE}"
    if foreign and not any(calls(node, PRODUCTS) for node in graph.nodes):
        node = foreign[0]
        return f"{_where(node)}the model's attention must be within {_name(node)}, one fused operator: {_ADVICE}"
    return None


def named_attention(graph: Graph) -> str | None:
    """The same message, found by the names of operators only, for a graph that need not be canonical."""
    for node in graph.nodes:
        called = node.op == "call_function" and not calls(node, {aten.scaled_dot_product_attention})
        if called and _ATTENTION.search(_name(node)):
            return f"{_where(node)}attention is one fused operator, {_name(node)}: {_ADVICE}"
    return None


def blamed_operator(error: Exception) -> str | None:
    """The message for an operator that, by its error, PyTorch cannot run or export; None for other errors."""
    said = str(error)
    if "CausalBias" in said:
        return "attn_mask is a torch.nn.attention.bias, which cannot be captured; give is_causal=True, or a tensor"
    if isinstance(error, UnsupportedOperatorException):  # the operator has no fake kernel
        namespace, name, *_ = said.split("\n")[0].split(".")
        return f"the operator {namespace}.{name} cannot be captured; if it is attention, {_ADVICE}"
    for namespace, name in re.findall(r"(\w+)::(\w+)", said):
        if _ATTENTION.search(name) or (namespace not in _OF_TORCH and "fake impl" in said):
            return f"the operator {namespace}.{name} cannot be captured; if it is attention, {_ADVICE}"
    return None


def _name(node: Node) -> str:
    """`namespace.operator`, without the overload."""
    packet = getattr(node.target, "overloadpacket", node.target)
    name = getattr(packet, "_qualified_op_name", None)
    return name.replace("::", ".") if name else getattr(node.target, "__name__", str(node.target))


def _is_foreign(node: Node) -> bool:
    namespace = getattr(node.target, "namespace", None) if node.op == "call_function" else None
    return namespace is not None and namespace not in _OF_TORCH


def _where(node: Node) -> str:
    module = node.meta.get("module")
    return f"{module}: " if module else ""

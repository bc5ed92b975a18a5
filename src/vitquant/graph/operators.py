"""The vocabulary of captured graphs: which ATen operators move data, and which compute what.

Sets hold operator packets, so that one entry stands for all overloads.
"""

from __future__ import annotations

import operator
from collections.abc import Container
from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten

# Every element of the input appears exactly once in the output, so one quantizer serves both.
REARRANGEMENTS = {
    aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten, aten.permute, aten.transpose, aten.t,
    aten.movedim, aten.squeeze, aten.unsqueeze, aten.roll, aten.flip, aten.pixel_shuffle, aten.pixel_unshuffle,
    aten.channel_shuffle, aten.alias, aten.clone, aten.contiguous, aten.detach,
}  # fmt: skip
# The output has some of the input's elements, perhaps several times, perhaps padded with zeros.
SELECTIONS = {
    aten.slice, aten.select, aten.narrow, aten.index_select, aten.split, aten.split_with_sizes, aten.chunk,
    aten.unbind, aten.unfold, aten.expand, aten.repeat, aten.pad, aten.constant_pad_nd, aten.tile,
}  # fmt: skip
JOINS = {aten.cat, aten.stack}

# The value that each fills with (None: an argument). They read only shape, dtype and device of their first argument.
FILLS = {aten.new_zeros: 0, aten.zeros_like: 0, aten.new_ones: 1, aten.ones_like: 1, aten.new_full: None}

LINEAR = {aten.linear}
CONVOLUTIONS = {aten.conv1d, aten.conv2d, aten.convolution}
PRODUCTS = {aten.matmul, aten.bmm}
SOFTMAX = {aten.softmax, aten._softmax}
NORMS = {
    aten.layer_norm: "layer_norm",
    aten.native_layer_norm: "layer_norm",
    aten.rms_norm: "rms_norm",
    aten.group_norm: "group_norm",
    aten.batch_norm: "batch_norm",
    aten._native_batch_norm_legit_no_training: "batch_norm",
}
ACTIVATIONS = {
    aten.gelu, aten.relu, aten.silu, aten.hardswish, aten.hardsigmoid, aten.sigmoid, aten.tanh, aten.leaky_relu,
    aten.elu, aten.hardtanh, aten.relu6, aten.mish, aten.softplus, aten.selu, aten.celu, aten.prelu, aten.log_sigmoid,
}  # fmt: skip
POOLS = {
    aten.mean, aten.avg_pool1d, aten.avg_pool2d, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d,
    aten._adaptive_avg_pool2d, aten.max_pool1d, aten.max_pool2d, aten.adaptive_max_pool2d, aten.amax,
}  # fmt: skip
MAX_POOLS = {aten.max_pool1d, aten.max_pool2d, aten.adaptive_max_pool2d, aten.amax}
# These scale, bias or mask scores between their product and the softmax, and rotate query and key before it.
ON_SCORES = {
    aten.add, aten.sub, aten.mul, aten.div, aten.neg, aten.clamp, aten.where, aten.masked_fill, aten.to, aten._to_copy,
    aten.type_as, aten.slice_scatter, aten.select_scatter,
}  # fmt: skip


def packet(node: Node) -> Any:
    """The operator of a node without its overload; the function itself for a Python function."""
    return getattr(node.target, "overloadpacket", node.target)


def arguments(node: Node) -> tuple[Any, ...]:
    """The positional arguments, typed as Any: fx types them as a union, while the operator's schema fixes the type."""
    return node.args


def calls(node: object, operators: Container[object]) -> bool:
    """Whether `node` is a call of one of `operators`."""
    return isinstance(node, Node) and node.op == "call_function" and packet(node) in operators


def is_rearrangement(node: Node) -> bool:
    """Whether the node only moves elements, each exactly once."""
    return calls(node, REARRANGEMENTS)


def is_selection(node: Node) -> bool:
    """Whether the node takes a part of one tensor, or pads it with zeros."""
    return calls(node, SELECTIONS) or (node.op == "call_function" and node.target is operator.getitem)

"""Scales and shifts of a LayerNorm's channels, moved between it and the linear layers that read it."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vitquant.graph.operators import LINEAR, arguments, aten, calls, is_rearrangement, is_selection, packet
from vitquant.graph.stored import stored, times_read, unquantized


class NotFoldableError(Exception):
    """Nothing can be moved across a LayerNorm; the message says why."""


@dataclass(frozen=True)
class Affine:
    """The stored tensors of one layer.

    Arguments:
        weight: (channels,) of a LayerNorm, (outputs, channels) of a linear layer.
        bias: (channels,) or (outputs,); None where the layer has none.
    """

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class FoldableNorm:
    """A LayerNorm whose output only linear layers read.

    Arguments:
        norm: its gain and bias.
        linears: the linear layers that read it, by the name of their graph node.
        padded: whether its output is padded with zeros before a linear layer reads it, as in Swin's windows.
    """

    norm: Affine
    linears: dict[str, Affine]
    padded: bool

    @property
    def shiftable(self) -> bool:
        """Whether its output may be shifted and not only scaled: all layers have a bias, and there is no padding."""
        return not self.padded and all(layer.bias is not None for layer in (self.norm, *self.linears.values()))


def foldable_norm(module: GraphModule, node: Node) -> FoldableNorm:
    """A LayerNorm and the linear layers that its channels can be folded into.

    Arguments:
        module: the graph; quantizers in it are skipped.
        node: the LayerNorm.

    Raises:
        NotFoldableError: the LayerNorm has no gain or normalizes more than the channels, something other than a linear
            layer reads it or moves its channels, or a tensor of these layers is computed or used elsewhere too.
    """
    if len(arguments(node)) < 3 or arguments(node)[2] is None:
        raise NotFoldableError("it has no gain")
    if len(arguments(node)[1]) != 1:
        raise NotFoldableError("it normalizes more than the channels")
    linears, padded = _readers(node)
    counts = times_read(module)
    layers = {reader.name: _affine(module, counts, *_affine_nodes(reader, 1)) for reader in linears}
    return FoldableNorm(_affine(module, counts, *_affine_nodes(node, 2)), layers, padded)


def fold(layers: FoldableNorm, ratio: Tensor, shift: Tensor) -> None:
    """Change the LayerNorm's output from x to x / ratio - shift, and the linear layers so that theirs stay the same.

    With x' = x / ratio - shift, W x + b = (W ratio) x' + b + (W ratio) shift: the gain becomes gain / ratio, the bias
    bias / ratio - shift, the weights W ratio and their biases b + (W ratio) shift. Nothing is divided by a gain, so
    a gain of zero is harmless. Computed in float64 and stored in the layers' own type.

    Arguments:
        layers: changed in place.
        ratio: float64 (channels,), positive.
        shift: float64 (channels,); zero unless `layers.shiftable`.

    Raises:
        NotFoldableError: `shift` is not zero and the layers are not shiftable.

    Source: RepQ-ViT, Li et al. 2023, section "Scale Reparam for LayerNorm Activations", equations of gamma, beta, W, b.
    """
    if not layers.shiftable and bool(shift.any()):
        raise NotFoldableError("its output cannot be shifted: a layer has no bias, or zeros lie beside it")
    with torch.no_grad():
        norm = layers.norm
        norm.weight.copy_(norm.weight.double() / ratio)
        if norm.bias is not None:
            norm.bias.copy_(norm.bias.double() / ratio - shift)
        for linear in layers.linears.values():
            weight = linear.weight.double() * ratio
            linear.weight.copy_(weight)
            if linear.bias is not None:
                linear.bias.copy_(linear.bias.double() + weight @ shift)


def _readers(node: Node) -> tuple[list[Node], bool]:
    """The linear layers that read a tensor, rearranged or in part, and whether it is padded with zeros on the way."""
    linears: dict[Node, None] = {}
    padded = False
    waiting = [(node, user) for user in node.users]
    while waiting:
        source, user = waiting.pop(0)
        if calls(user, LINEAR) and arguments(user)[0] is source:
            linears[user] = None
        elif user.op == "call_module" or is_rearrangement(user) or is_selection(user):
            if user.op == "call_function" and not _keeps_channels_last(source, user):
                raise NotFoldableError(f"{user.name} moves its channels")
            padded = padded or calls(user, {aten.pad, aten.constant_pad_nd})
            waiting += [(user, each) for each in user.users]
        else:
            raise NotFoldableError(f"{user.name} reads it too, which is no linear layer")
    if not linears:
        raise NotFoldableError("no linear layer reads it")
    return list(linears), padded


def _keeps_channels_last(source: Node, node: Node) -> bool:
    """Whether the last axis of a rearrangement's or selection's result is that of what it reads."""
    if not source.meta.get("shape"):  # one part of a split, which was checked itself
        return True
    rank, width = len(source.meta["shape"]), source.meta["shape"][-1]
    axes: tuple[int, ...] = ()
    match packet(node):
        case aten.permute:
            return arguments(node)[1][-1] % rank == rank - 1
        case aten.transpose | aten.t | aten.movedim:
            moved = arguments(node)[1:3] or (0, 1)
            axes = sum((tuple(axis) if isinstance(axis, list | tuple) else (axis,) for axis in moved), ())
        case aten.flip:
            axes = tuple(arguments(node)[1])
        case aten.roll:
            axes = tuple((arguments(node)[2:3] or ((),))[0]) or (-1,)  # without axes it rolls all elements
        case aten.split | aten.split_with_sizes | aten.chunk:
            axes = arguments(node)[2:3] or (0,)
        case aten.unbind | aten.select | aten.slice | aten.narrow | aten.index_select:
            axes = arguments(node)[1:2] or (0,)
        case aten.pad | aten.constant_pad_nd:
            return tuple(arguments(node)[1][:2]) == (0, 0)
        case aten.pixel_shuffle | aten.pixel_unshuffle | aten.channel_shuffle | aten.unfold | aten.repeat | aten.tile:
            return False
        case _:
            return node.target is operator.getitem or node.meta["shape"][-1] == width
    return all(int(axis) % rank != rank - 1 for axis in axes)


def _affine_nodes(node: Node, first: int) -> tuple[Node, Node | None]:
    """The weight, which is argument `first` of a layer, and the bias, which is the next argument, or None."""
    given = (*arguments(node), *(None,) * 5)
    return given[first], node.kwargs.get("bias", given[first + 1])  # type: ignore[return-value]


def _affine(module: GraphModule, counts: Counter[int], *nodes: Node | None) -> Affine:
    weight, bias = (None if node is None else _read_once(module, counts, node) for node in nodes)
    assert weight is not None
    return Affine(weight, bias)


def _read_once(module: GraphModule, counts: Counter[int], node: Node) -> Tensor:
    tensor = stored(module, node)
    if tensor is None:
        raise NotFoldableError(f"{node.name} is computed, not stored")
    if counts[id(tensor)] > 1:
        raise NotFoldableError(f"{unquantized(node).target} is used elsewhere too")
    return tensor

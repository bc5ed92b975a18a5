"""The operations of a graph that can be quantized, found by dataflow and never by module name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from vitquant.graph import operators as ops
from vitquant.graph.attention import Attention, find_attention
from vitquant.graph.kinds import KINDS
from vitquant.graph.masks import unmasked
from vitquant.graph.naming import name_operations
from vitquant.graph.operators import arguments, aten, calls, packet
from vitquant.graph.padding import unpadded
from vitquant.graph.walk import (
    ancestors,
    depends_on_input,
    nodes_by_name,
    path_between,
    positions,
    root,
    selected_from,
)

IMAGE = "image"  # `made_by` of a value that comes from the model's input


@dataclass(frozen=True)
class Reader:
    """One operand of one site, written `site:operand` (`blocks.0.attn.scores:query`).

    Arguments:
        site: the site's name, the same for every library where the structure is the same.
        module: the path of the module that the operation came from, as the library names it.
        kind: one of `kinds.KINDS`.
        operand: one of `kinds.OPERANDS`.
    """

    site: str
    module: str
    kind: str
    operand: str

    def __str__(self) -> str:
        return f"{self.site}:{self.operand}"


@dataclass(frozen=True)
class Value:
    """One tensor that quantizable operations read; it has at most one quantizer, shared by all of its readers.

    Arguments:
        node: the graph node whose result the readers read.
        readers: every operand that reads it, in graph order; the first gives the value its name.
        shape: sizes; -1 stands for a size that grows with the batch.
        channel_axis: the axis that `per = "axis"` means: 0 for a weight, 1 around convolutions,
            -1 elsewhere.
        parameter: state-dict key when the tensor is a stored parameter, else None.
        made_by: the kind of the site that computes it, perhaps rearranged, selected from, scaled or shifted since;
            `image` for the model's input; empty where it comes from no site or from several tensors.
    """

    node: str
    readers: tuple[Reader, ...]
    shape: tuple[int, ...]
    channel_axis: int
    parameter: str | None = None
    made_by: str = ""

    @property
    def name(self) -> str:
        """The first reader, as `site:operand`."""
        return str(self.readers[0])


@dataclass(frozen=True)
class Site:
    """One operation whose operands can be quantized.

    Arguments:
        name: `blocks.0.attn.scores`; see `naming`.
        kind: one of `kinds.KINDS`.
        module: the path of the module that the operation came from, as the library names it.
        node: the name of its graph node.
        operands: the name of the graph node that each operand reads.
        block: number of its transformer block, counted from 0; None outside of blocks.
    """

    name: str
    kind: str
    module: str
    node: str
    operands: dict[str, str]
    block: int | None = None

    def reader(self, operand: str) -> Reader:
        """The reader that is this site's `operand`."""
        return Reader(self.name, self.module, self.kind, operand)


def find_sites(module: GraphModule) -> tuple[Site, ...]:
    """All sites of a captured graph, in graph order, each with a name of its own.

    Arguments:
        module: what `capture` returned; quantizers must not have been inserted yet.
    """
    graph = module.graph
    dynamic = depends_on_input(graph)
    attention = find_attention(graph)
    before, place = ancestors(graph), positions(graph)
    found: list[tuple[Node, str, dict[str, Node]]] = []
    for node in graph.nodes:
        if node.op == "output":
            found += [(node, "output", {"input": result}) for result in arguments(node)[0] if is_float(result)]
        elif node.op == "call_function" and node in dynamic and is_float(node):
            kind, operands = _classify(node, dynamic, attention)
            if kind == "softmax":
                operands = {"input": unmasked(module, operands["input"])}
            if kind == "residual" and before[root(operands["lhs"])] >> place[root(operands["rhs"])] & 1:
                # `lhs` is the residual stream and `rhs` the branch, in whichever order the library adds them.
                operands = {"lhs": operands["rhs"], "rhs": operands["lhs"]}
            if kind:
                found.append((node, kind, operands))
    names = name_operations(module, found, attention)
    return tuple(
        Site(
            name=name,
            kind=kind,
            module=_module_path(node, operands),
            node=node.name,
            operands={operand: value.name for operand, value in operands.items()},
            block=block,
        )
        for (node, kind, operands), (name, block) in zip(found, names, strict=True)
    )


def _classify(node: Node, dynamic: set[Node], attention: Attention) -> tuple[str, dict[str, Node]]:
    """The kind of an operation and its operands; the kind is empty if the operation is not a site."""
    read = arguments(node)
    if calls(node, ops.LINEAR) or calls(node, ops.CONVOLUTIONS):
        kind = "linear" if calls(node, ops.LINEAR) else "conv"
        return kind, {"input": read[0], "weight": read[1]}
    if calls(node, ops.NORMS):
        return ops.NORMS[packet(node)], {"input": read[0]}
    if calls(node, ops.SOFTMAX):
        return "softmax", {"input": read[0]}
    if calls(node, ops.ACTIVATIONS):
        return "activation", {"input": read[0]}
    if calls(node, ops.POOLS):
        return "pool", {"input": unpadded(read[0]) if calls(node, ops.MAX_POOLS) else read[0]}
    if calls(node, ops.PRODUCTS):
        left, right = read[0], read[1]
        if node in attention.scores:
            return "scores", {"query": left, "key": right}
        if node in attention.contexts:
            probs_first = attention.contexts[node]
            probs, value = (left, right) if probs_first else (right, left)
            return "context", {"probs": probs, "value": value}
        return "product", {"lhs": left, "rhs": right}
    if calls(node, ops.JOINS) and node not in attention.inside and selected_from(node) is None:
        return "concat", {"input": node}
    if calls(node, {aten.add, aten.mul}) and node not in attention.inside:
        return _classify_elementwise(node, dynamic)
    return "", {}


def _classify_elementwise(node: Node, dynamic: set[Node]) -> tuple[str, dict[str, Node]]:
    left, right = arguments(node)[0], arguments(node)[1]
    if not (isinstance(left, Node) and isinstance(right, Node) and is_float(left) and is_float(right)):
        return "", {}
    both = left in dynamic and right in dynamic
    if calls(node, {aten.mul}):
        return ("gate", {"lhs": left, "rhs": right}) if both else ("", {})
    # A vector of one value per channel is a bias, not an operand.
    is_bias = any(other not in dynamic and _is_vector(other) for other in (left, right))
    if is_bias:
        return "", {}
    return "residual", {"lhs": left, "rhs": right} if left in dynamic else {"lhs": right, "rhs": left}


def _is_vector(node: Node) -> bool:
    return sum(size != 1 for size in node.meta["shape"]) <= 1


def is_float(node: object) -> bool:
    """Whether an object is a graph node whose result is a floating-point tensor."""
    dtype = node.meta.get("dtype") if isinstance(node, Node) and node.op != "output" else None
    return dtype is not None and dtype.is_floating_point


def _module_path(node: Node, operands: dict[str, Node]) -> str:
    weight = operands.get("weight")
    if weight is not None and weight.op == "get_attr":
        return str(weight.target).rpartition(".")[0]
    return str(node.meta.get("module", ""))


def find_values(module: GraphModule, sites: Iterable[Site]) -> tuple[Value, ...]:
    """The tensors that the sites read, each once, with all of its readers.

    Two operands read one value when their tensors hold the same elements, only rearranged; an operand
    that reads a part of a tensor which another site reads whole shares that tensor's value too (class
    attention's query). Parts of a tensor that nobody reads whole (query, key and value of a joint
    projection) are values of their own, so that they mean the same in every library.
    """
    nodes = nodes_by_name(module.graph)
    reads = [(site, operand, nodes[name]) for site in sites for operand, name in site.operands.items()]
    whole = {root(node) for _, _, node in reads}
    groups: dict[Node, list[tuple[Site, str, Node]]] = {}
    for site, operand, node in reads:
        groups.setdefault(_source(node, whole), []).append((site, operand, node))
    makers, dynamic = {nodes[site.node]: site.kind for site in sites}, depends_on_input(module.graph)
    return tuple(
        _value(source, group, nodes[group[0][0].node], _made_by(source, makers, dynamic))
        for source, group in groups.items()
    )


def _made_by(node: Node, makers: Mapping[Node, str], dynamic: set[Node]) -> str:
    while node not in makers:
        read = [each for each in node.all_input_nodes if each in dynamic]
        if len(read) != 1:
            return IMAGE if node.op == "placeholder" else ""
        node = read[0]
    return makers[node]


def _source(node: Node, whole: set[Node]) -> Node:
    source = root(node)
    while (wider := selected_from(source)) is not None:
        if wider in whole:
            return _source(wider, whole)
        if calls(source, ops.JOINS):
            break
        source = wider
    return root(node)


def _value(source: Node, group: list[tuple[Site, str, Node]], operation: Node, made_by: str) -> Value:
    read = {node for _, _, node in group}
    node = read.pop() if len(read) == 1 else source
    site, operand, seen = group[0]
    axis = {"weight": 0, "key": -2}.get(operand, 1 if _channels_first(site.kind, operation, seen) else -1)
    if node is not seen:
        axis = _axis_before(node, seen, axis)
    return Value(
        node=node.name,
        readers=tuple(site.reader(operand) for site, operand, _ in group),
        shape=tuple(node.meta["shape"]),
        channel_axis=axis,
        parameter=str(node.target) if node.op == "get_attr" else None,
        made_by=made_by,
    )


def _channels_first(kind: str, operation: Node, read: Node) -> bool:
    """Whether axis 1 of an operation's input holds the channels: by its kind, or because a convolution computed it."""
    if KINDS[kind].channels_first:
        return True
    if kind == "pool":
        if not calls(operation, {aten.mean, aten.amax}):
            return True
        rank, axes = len(read.meta["shape"]), arguments(operation)[1:2]
        reduced = {axis % rank for axis in axes[0]} if axes and axes[0] else set()
        return 1 not in reduced and rank - 1 in reduced
    while calls(read, ops.ACTIVATIONS | {aten.add, aten.mul}):
        read = max(read.all_input_nodes, key=lambda source: len(source.meta.get("shape") or ()))
    return calls(read, ops.CONVOLUTIONS) or (calls(read, ops.NORMS) and KINDS[ops.NORMS[packet(read)]].channels_first)


def _axis_before(node: Node, reader: Node, axis: int) -> int:
    """The axis of `node` that is `axis` of `reader`, which is a rearrangement or a part of `node`."""
    axis %= len(reader.meta["shape"])
    for step in reversed(path_between(node, reader)):
        if step.meta.get("shape"):  # a split has no single shape, and its parts have
            axis = _axis_in_source(step, axis)
    return -1 if axis == len(node.meta["shape"]) - 1 else axis


def _axis_in_source(step: Node, axis: int) -> int:
    """The axis of a rearrangement's or selection's input that is an axis of its result."""
    rank, source = len(step.meta["shape"]), step.all_input_nodes[0]
    if calls(step, {aten.permute}):
        return arguments(step)[1][axis] % rank
    if calls(step, {aten.transpose}):
        first, second = (int(dim) % rank for dim in arguments(step)[1:3])
        return {first: second, second: first}.get(axis, axis)
    if calls(step, {aten.select}) or calls(source, {aten.unbind}):  # these remove an axis
        given = arguments(step if calls(step, {aten.select}) else source)[1:2]
        taken = int(given[0]) % (rank + 1) if given else 0
        return axis + (axis >= taken)
    before = source.meta.get("shape")
    if not before or before == step.meta["shape"] or calls(step, ops.SELECTIONS):
        return axis
    # A reshape keeps the stride of the axis: the number of elements in one step along it.
    inside, place = math.prod(step.meta["shape"][axis + 1 :]), len(before) - 1
    while place and -1 not in before[place:] and math.prod(before[place:]) <= inside:
        place -= 1
    return place

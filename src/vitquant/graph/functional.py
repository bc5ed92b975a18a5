"""The functional form of an exported program: nothing is overwritten, and every reshape is a view or a copy."""

from __future__ import annotations

import operator
from typing import Any

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node

from vitquant.graph.operators import arguments, aten, packet

# What tracing again leaves as it is, or `canonicalize` removes. One that is missing here costs time, and nothing else.
_STAYS = {
    operator.getitem, operator.mul, operator.add, operator.floordiv, aten.sym_size, aten._assert_tensor_metadata,
    aten.linear, aten.matmul, aten.bmm, aten.einsum, aten.scaled_dot_product_attention, aten.softmax, aten.layer_norm,
    aten.gelu, aten.relu, aten.silu, aten.hardswish, aten.sigmoid, aten.tanh, aten.add, aten.sub, aten.mul, aten.div,
    aten.neg, aten.exp, aten.clamp, aten.clamp_min, aten.linalg_vector_norm, aten.mean, aten.cat, aten.stack, aten.view,
    aten.transpose, aten.permute, aten.roll, aten.select, aten.slice, aten.unbind, aten.split_with_sizes, aten.squeeze,
    aten.unsqueeze, aten.expand, aten.pad, aten.index, aten.masked_fill, aten.dropout, aten.contiguous,
}  # fmt: skip
# These stay too, but the memory format that they choose for an input that is not contiguous may be another.
_STAYS_IF_CONTIGUOUS = {aten.conv2d, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.max_pool2d}
_RESHAPES = {aten.reshape, aten.flatten, aten.unflatten}


def functional(program: ExportedProgram) -> ExportedProgram:
    """The program in functional form, with no operator decomposed; the program itself may be changed into it.

    PyTorch makes that form by tracing again, which takes twice as long as the export. Most models overwrite nothing,
    and have only operators that tracing again leaves as they are; of these the reshapes are rewritten here.
    """
    sizes = _sizes_of_reshapes(program)
    if sizes is None:
        return program.run_decompositions({})
    for node, found in sizes.items():
        node.target, node.args, node.kwargs = aten.view.default, (arguments(node)[0], found), {}
    return program


def _sizes_of_reshapes(program: ExportedProgram) -> dict[Node, list[Any]] | None:
    """What the functional form changes in the program: the sizes of its reshapes; None if more than these."""
    kinds = {spec.arg.name: spec.kind for spec in program.graph_signature.input_specs}
    unread = _unread(program.graph)
    constants: set[Node] = set()  # computed once, when the program is copied
    sizes: dict[Node, list[Any]] = {}
    batch: Node | None = None
    for node in program.graph.nodes:
        if node.op == "placeholder" and kinds[node.name] is InputKind.CONSTANT_TENSOR:
            constants.add(node)
        if node.op != "call_function" or node in unread:
            continue
        if constants.issuperset(node.all_input_nodes) and _overwrites_nothing(node):
            constants.add(node)
        elif packet(node) in _RESHAPES:
            if (found := _sizes(node, batch)) is None:
                return None
            sizes[node] = found
        elif packet(node) in _STAYS_IF_CONTIGUOUS:
            if not arguments(node)[0].meta["val"].is_contiguous():
                return None
        elif packet(node) not in _STAYS or _drops(node):
            return None
        elif packet(node) is aten.sym_size and arguments(node)[1] == 0:
            batch = batch or node
    return sizes


def _drops(node: Node) -> bool:
    """Whether the node is a dropout in training mode, of which tracing again leaves nothing where its share is 0."""
    return packet(node) is aten.dropout and arguments(node)[2] is not False


def _unread(graph: Graph) -> set[Node]:
    """The nodes whose removal changes nothing."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "call_function" and found.issuperset(node.users) and _overwrites_nothing(node):
            found.add(node)
    return found


def _overwrites_nothing(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or not schema.is_mutable


def _sizes(node: Node, batch: Node | None) -> list[Any] | None:
    """The sizes with which tracing again writes a reshape; None where one of them is no value of the program.

    Arguments:
        batch: the number of images, if that is a value before it.
    """
    result = node.meta["val"].shape
    given = list(arguments(node)[1]) if packet(node) is aten.reshape else [None] * len(result)
    if packet(node) is aten.reshape and arguments(node)[0].meta["val"].is_contiguous():
        return given  # even a size of -1 stays
    found: list[Any] = []
    for said, size in zip(given, result, strict=True):
        if isinstance(size, int):
            found.append(size)
        elif isinstance(said, Node):
            found.append(said)
        elif batch is not None and size.node.expr == batch.meta["val"].node.expr:
            found.append(batch)
        else:
            return None
    return found

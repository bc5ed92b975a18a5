"""Fold masks that a forward computes for every batch from the positions of tokens alone into constants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from vitquant.graph.masks import hides_some, stored_constant
from vitquant.graph.operators import FILLS, arguments, aten, calls


def fold_made_masks(module: GraphModule, example: Tensor, longer: Tensor) -> None:
    """Replace masks that are the same for every image, but whose shape depends on the batch, by constants.

    `masks.is_mask` recognizes a mask only as a constant; otherwise it would count as a range of values. Sizes that grow
    with the batch become 1, which broadcasts where the mask is read.

    Arguments:
        module: captured; changed in place. The nodes that computed its masks stay in the graph without a reader.
        example, longer: batches of different sizes. A mask is folded where both give the same for every image.
    """
    of_positions = _of_positions(module)
    read = [(user, node) for user in module.graph.nodes for node in _masks_of(user, of_positions)]
    made = {node for _, node in read if node.op != "get_attr" and stored_constant(module, node) is None}
    if not made:
        return
    short, long = _values(module, example, made), _values(module, longer, made)
    constants: dict[Node, Tensor] = {}
    for node in made:
        value = _of_one_image(node, short[node], long[node])
        if value is not None and (value.dtype == torch.bool or hides_some(value)):
            constants[node] = value
    names: dict[Node, str] = {}
    for user, node in read:
        if node in constants:
            if node not in names:
                names[node] = _register(module, constants[node])
            with module.graph.inserting_before(user):
                constant = module.graph.get_attr(names[node])
            constant.meta = {**node.meta, "shape": tuple(constants[node].shape)}
            user.replace_input_with(node, constant)


# These number the entries of their result: along the batch, the numbers would differ from image to image.
_NUMBERING = {aten.arange, aten.linspace, aten.eye, aten.tril_indices, aten.triu_indices}


def _of_positions(module: GraphModule) -> set[Node]:
    """The nodes that depend on the input's shape at most: on no value of it, no parameter, and no image's number."""
    found: set[Node] = set()
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for node in module.graph.nodes:
        if node.op == "get_attr":
            fits = str(node.target) not in parameters
        elif node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            fits = False
        elif calls(node, {aten.sym_size}):
            fits = True
        elif calls(node, _NUMBERING):  # where the size is fixed, capture has made a constant of it
            fits = False
        else:  # a fill such as zeros_like reads only the shape of its first argument
            read = node.all_input_nodes[1:] if calls(node, FILLS) else node.all_input_nodes
            fits = all(each in found for each in read)
        if fits:
            found.add(node)
    return found


def _masks_of(user: Node, of_positions: set[Node]) -> Iterator[Node]:
    """The operands that a node reads as a mask and that depend on positions only, where its result does not."""
    if user in of_positions or user.op != "call_function":
        return
    given: Mapping[str, Any] = user.kwargs
    read = arguments(user)
    if calls(user, {aten.add}) and not given:
        places = [
            one
            for one, other in ((read[0], read[1]), (read[1], read[0]))
            if isinstance(other, Node) and other.meta.get("shape") == user.meta["shape"]  # it is not broadcast
        ]
    elif calls(user, {aten.masked_fill}):
        places = [read[1]]
    elif calls(user, {aten.baddbmm}):
        places = [read[0]]
    elif calls(user, {aten.scaled_dot_product_attention}):
        places = [read[3] if len(read) > 3 else given.get("attn_mask")]
    else:
        return
    yield from (each for each in places if isinstance(each, Node) and each in of_positions)


def _values(module: GraphModule, images: Tensor, wanted: set[Node]) -> dict[Node, Tensor]:
    found: dict[Node, Tensor] = {}

    class Recorded(Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            if n in wanted:
                found[n] = result
            return result

    with torch.no_grad():
        Recorded(module).run(images)
    return found


def _of_one_image(node: Node, short: Tensor, long: Tensor) -> Tensor | None:
    """The mask with size 1 along every axis that grows with the batch; None where it differs between images."""
    for axis, size in enumerate(node.meta["shape"]):
        if size == -1:
            if not all(torch.equal(each, each.narrow(axis, 0, 1).expand_as(each)) for each in (short, long)):
                return None
            short, long = short.narrow(axis, 0, 1), long.narrow(axis, 0, 1)
    return short.clone() if torch.equal(short, long) else None


def _register(module: GraphModule, value: Tensor) -> str:
    number = 0
    while hasattr(module, name := f"mask_{number}"):
        number += 1
    module.register_buffer(name, value, persistent=False)
    return name

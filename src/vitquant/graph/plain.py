"""A graph as plain data that can be pickled: torch pickles a graph's code, and loses names, shapes and output types."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate, map_arg


@dataclass(frozen=True)
class _Result:
    """A reference to the result of the node of that name."""

    name: str


@dataclass(frozen=True)
class _Operator:
    """An operator of `torch.ops`, such as `aten.gelu.default`; it cannot be pickled itself."""

    name: str


@dataclass(frozen=True)
class _Plain:
    """A graph node as plain data; the fields are those of `torch.fx.Node`."""

    op: str
    target: Any
    args: Any
    kwargs: Any
    name: str
    meta: dict[str, Any]


def plain(module: GraphModule) -> dict[str, Any]:
    """Everything that a graph module consists of, its graph as plain data."""
    parts = {name: part for name, part in module.__dict__.items() if name != "_graph"}
    nodes, codegen = plain_nodes(module.graph), module.graph._codegen  # pyright: ignore[reportPrivateUsage]
    return {"class_name": type(module).__name__, "nodes": nodes, "codegen": codegen, "parts": parts}


def rebuilt(described: dict[str, Any]) -> GraphModule:
    """The graph module that `plain` described."""
    module = GraphModule(torch.nn.Module(), Graph(), described["class_name"])
    module.__dict__.update(described["parts"])
    graph = graph_of(described["nodes"])
    graph.set_codegen(described["codegen"])
    module.graph = graph  # compiles it
    return module


def plain_nodes(graph: Graph) -> list[Any]:
    """The nodes of a graph as plain data."""
    return [
        _Plain(
            node.op,
            _Operator(str(node.target)) if isinstance(node.target, OpOverload) else node.target,
            map_arg(node.args, _result),
            map_arg(node.kwargs, _result),
            node.name,
            dict(node.meta),
        )
        for node in graph.nodes
    ]


def _result(node: Node) -> Any:
    return _Result(node.name)


def graph_of(nodes: Iterable[_Plain]) -> Graph:
    """The graph made of nodes that `plain_nodes` returned."""
    graph, made = Graph(), {}

    def node_of(argument: Any) -> Any:
        return made[argument.name] if isinstance(argument, _Result) else argument

    for node in nodes:
        target = attrgetter(node.target.name)(torch.ops) if isinstance(node.target, _Operator) else node.target
        given, keywords = (map_aggregate(found, node_of) for found in (node.args, node.kwargs))
        made[node.name] = graph.create_node(node.op, target, given, keywords, node.name)
        made[node.name].meta = node.meta
    return graph

"""A part of a captured graph as a module: a block, an attention, everything before or after a tensor."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from vitquant.autocast import own_precision
from vitquant.errors import CaptureError
from vitquant.graph.index import GraphIndex
from vitquant.graph.operators import arguments, aten, calls, is_rearrangement
from vitquant.graph.plain import graph_of, plain_nodes
from vitquant.graph.sites import Site
from vitquant.graph.taps import TappedInterpreter
from vitquant.graph.walk import depends_on_input, descendants, nodes_by_name

IMAGES = "images"
QUANTIZERS = "quantizers"  # the submodule of a graph module that holds its quantizers


class Segment(nn.Module):
    """A part of a captured model as a module that runs and is differentiable on its own.

    It shares its parameters, buffers and quantizers with the model: training the segment trains the model.

    Arguments:
        module: the graph module that it is a part of.
        graph: the segment's own graph; its placeholders are the inputs.
        inputs, outputs: the names of the input and output tensors.
        quantized: see `TappedInterpreter`.

    Attributes:
        inputs, outputs: as given; where `outputs` is one name, a call returns one tensor, and a tuple otherwise.
        axes: the axis of each input that grows with the batch; None for an input that has none.
        shapes: the shape of each output by its name, -1 for the size that grows with the batch.

    Pitfall: a quantizer that is inserted into the model later is not in the segment; make the segment again.
    """

    def __init__(
        self,
        module: GraphModule,
        graph: Graph,
        inputs: tuple[str, ...],
        outputs: str | tuple[str, ...],
        quantized: bool | Collection[str],
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self._graph, self._quantized = graph, quantized
        read = [node.meta["shape"] for node in graph.nodes if node.op == "placeholder"]
        self.axes = tuple(shape.index(-1) if -1 in shape else None for shape in read)
        results: Any = next(node.args[0] for node in graph.nodes if node.op == "output")
        results = (results,) if isinstance(results, Node) else results
        self.shapes = {name: result.meta["shape"] for name, result in zip(_several(outputs), results, strict=True)}
        for node in graph.nodes:
            if node.op in ("get_attr", "call_module"):
                _share(module, self, str(node.target))

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and copy.deepcopy take: the graph as plain data."""
        return {**super().__getstate__(), "_graph": plain_nodes(self._graph)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_graph": graph_of(state["_graph"])})

    def forward(self, *tensors: Tensor) -> Any:
        """One tensor for one name, a tuple for several.

        Arguments:
            tensors: one for each of `inputs`, in their order, for any number of images.
        """
        if len(tensors) != len(self.inputs):
            raise CaptureError(f"the segment takes {len(self.inputs)} tensors, {', '.join(self.inputs)}")
        with own_precision(tensors[0].device.type):
            return TappedInterpreter(self, self._graph, {}, self._quantized).run(*tensors)


def segment(
    module: GraphModule,
    index: GraphIndex,
    inputs: str | Sequence[str],
    outputs: str | Sequence[str],
    quantized: bool | Collection[str] = True,
) -> Segment:
    """The part of a captured graph between input tensors and output tensors.

    The name of a tensor is `images`; `SITE` for the result of that site before it is quantized (`output` for the
    model's output); `SITE:OPERAND` for an operand of a site, after its quantizer if it has one; or `%NODE` for the
    result of a graph node.

    Arguments:
        module: a captured graph, with its quantizers if it has any.
        index: the graph's index.
        inputs: the names of the segment's input tensors.
        outputs: the names of its output tensors.
        quantized: whether its quantizers quantize, or the targets of those that do.

    Raises:
        CaptureError: no tensor has such a name; an output depends on another tensor than the inputs, which the message
            names; or an input is not read.
    """
    nodes = nodes_by_name(module.graph)
    cuts = {_node(name, index, nodes): name for name in _several(inputs)}
    if not cuts or not _several(outputs):
        raise CaptureError("a segment has inputs and outputs: name one tensor of each at least")
    if len(cuts) < len(_several(inputs)):
        raise CaptureError(f"{', '.join(_several(inputs))}: two of these are one tensor; name it once")
    return _between(module, index, cuts, outputs, quantized)


def downstream_segment(
    module: GraphModule, index: GraphIndex, quantizers: Collection[str], outputs: str | Sequence[str]
) -> Segment:
    """The part of the graph that depends on some quantizers, up to some outputs, with all others switched off.

    Its inputs are the tensors that these quantizers read, and the other tensors of the float model that the part reads.

    Arguments:
        module, index, outputs: as for `segment`.
        quantizers: the targets of the quantizers that quantize.

    Raises:
        CaptureError: no tensor has such a name.
    """
    nodes, dynamic = nodes_by_name(module.graph), depends_on_input(module.graph)
    switched = {node for node in nodes.values() if node.op == "call_module" and node.target in quantizers}
    changed = descendants(switched, module.graph) | switched
    targets = [_node(name, index, nodes) for name in _several(outputs)]
    read = changed & _needed((), targets)
    ends = {target for target in targets if target not in changed}
    known = (node for node in nodes.values() if node in dynamic and node not in changed)
    cuts = [node for node in known if node in ends or not read.isdisjoint(node.users)]
    return _between(module, index, {node: f"%{node.name}" for node in cuts}, outputs, quantizers)


def boundary(module: GraphModule, index: GraphIndex, sites: Iterable[Site]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the inputs and of the outputs of the part of the graph that some sites span.

    They are names that `segment` takes, of tensors before they are quantized: the quantizers of the inputs belong to
    the part, and those of the outputs to the operations that read them.

    Arguments:
        module, index: as for `segment`.
        sites: those of a block or an attention, for example: they and everything between them are the part.
    """
    nodes, dynamic = nodes_by_name(module.graph), depends_on_input(module.graph)
    chosen = {nodes[site.node] for site in sites}
    behind = (descendants(chosen, module.graph) | chosen) & dynamic
    part = behind & _needed((), chosen)
    read = [each for node in nodes.values() if node in part for each in node.all_input_nodes]
    entering = dict.fromkeys(_unquantized(each) for each in read if each in dynamic and each not in part)
    leaving = [node for node in nodes.values() if node in part and not part.issuperset(_readers(node))]
    return tuple(_name(each, index) for each in entering), tuple(_name(each, index) for each in leaving)


def _unquantized(node: Node) -> Node:
    """The node before quantizers and rearrangements."""
    while is_quantizer(node) or is_rearrangement(node):
        node = node.all_input_nodes[0]
    return node


def _readers(node: Node) -> list[Node]:
    return [user for user in node.users if not _is_size(user)]


def quantizer_of(node: Node) -> Node | None:
    """The call of the quantizer of a node, which all readers of the node read in its place; None if it has none."""
    return next((user for user in node.users if is_quantizer(user)), None)


def _between(
    module: GraphModule,
    index: GraphIndex,
    cuts: dict[Node, str],
    outputs: str | Sequence[str],
    quantized: bool | Collection[str],
) -> Segment:
    """The segment from some nodes, given with the names of their tensors, to outputs."""
    nodes, names = nodes_by_name(module.graph), _several(outputs)
    targets = [_node(name, index, nodes) for name in names]
    needed = _needed(cuts, targets)
    _refuse_crossings(module, index, cuts, dict(zip(targets, names, strict=True)), needed)
    graph = Graph()
    made: dict[Node, Node] = {}
    for place, (cut, name) in enumerate(cuts.items()):
        if needed.isdisjoint(cut.users) and cut not in targets:
            raise CaptureError(f"{name} is not read on the way to {', '.join(names)}: leave it out")
        made[cut] = graph.placeholder(f"input{place}")
        made[cut].meta = dict(cut.meta)
    sizes = _Sizes(module, graph, cuts, made)
    for node in nodes.values():
        if node in needed and node not in made:
            made[node] = sizes.known(node) or graph.node_copy(node, made.__getitem__)
            made[node].meta = dict(node.meta)
    results = tuple(made[target] for target in targets)
    single = isinstance(outputs, str)
    graph.output(results[0] if single else results)
    return Segment(module, graph, tuple(cuts.values()), outputs if single else names, quantized)


def _several(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def is_quantizer(node: Node) -> bool:
    """Whether a node calls a quantizer."""
    return node.op == "call_module" and str(node.target).startswith(f"{QUANTIZERS}.")


def _node(name: str, index: GraphIndex, nodes: dict[str, Node]) -> Node:
    """The graph node of the tensor of that name."""
    if name == IMAGES:
        return next(node for node in nodes.values() if node.op == "placeholder")
    if name.startswith("%") and name[1:] in nodes:
        return nodes[name[1:]]
    site, _, operand = name.partition(":")
    found = next((each for each in index.sites if each.name == site), None)
    if found is not None and found.kind == "output":
        operand = "input"  # an output site computes nothing: its operand is the model's output
    if found is not None and operand in found.operands:
        read = nodes[found.operands[operand]]
        return quantizer_of(read) or read
    if found is not None and not operand:
        return nodes[found.node]
    near = [each.name for each in index.sites if each.name.partition(".")[0] == name.partition(".")[0]]
    hint = ", ".join((near or [each.name for each in index.sites])[:3])
    raise CaptureError(f"the model has no tensor {name!r}; give {IMAGES}, SITE or SITE:OPERAND (sites: {hint}, ...)")


def _needed(cuts: Collection[Node], targets: Iterable[Node]) -> set[Node]:
    """The nodes that the targets are computed from, themselves included, up to the cuts, which are excluded."""
    found: set[Node] = set()
    pending = [target for target in targets if target not in cuts]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [] if _is_size(node) else [each for each in node.all_input_nodes if each not in cuts]
    return found


def _is_size(node: Node) -> bool:
    return calls(node, {aten.sym_size})


def _refuse_crossings(
    module: GraphModule, index: GraphIndex, cuts: dict[Node, str], targets: dict[Node, str], needed: set[Node]
) -> None:
    """Refuse a segment that reads a tensor from outside that is not one of its inputs."""
    dynamic = depends_on_input(module.graph)
    behind = descendants(cuts, module.graph)
    for target, name in targets.items():
        if target not in behind and target not in cuts:
            raise CaptureError(f"{name} is not computed from {', '.join(cuts.values())}")
    for node in module.graph.nodes:
        if node not in needed or node not in behind:
            continue
        for read in node.all_input_nodes:
            if read in dynamic and read not in cuts and read not in behind and not _is_size(node):
                raise CaptureError(
                    f"{', '.join(cuts.values())} do not separate the graph: {_name(node, index)} also reads "
                    f"{_name(read, index)}; give that as an input, too"
                )


def _name(node: Node, index: GraphIndex) -> str:
    """The name of a node's tensor, for messages and for `segment`."""
    if node.op == "placeholder":
        return IMAGES
    if is_quantizer(node):
        return str(node.target).removeprefix(f"{QUANTIZERS}.")
    site = index.site_at(node.name)
    return f"%{node.name}" if site is None else site.name


class _Sizes:
    """Sizes of tensors outside of a segment, computed from those of its inputs: all are multiples of the batch."""

    def __init__(self, module: GraphModule, graph: Graph, cuts: dict[Node, str], made: dict[Node, Node]) -> None:
        self._module, self._graph, self._cuts, self._made = module, graph, cuts, made
        self._of_one_image: dict[Node, tuple[int, ...]] | None = None

    def known(self, node: Node) -> Node | None:
        """A new node in the segment's graph for a size of a tensor outside of it; None where `node` is no such size."""
        if not _is_size(node) or node.all_input_nodes[0] in self._made:
            return None
        source, axis = node.all_input_nodes[0], int(arguments(node)[1])
        cut, growing = next((cut, cut.meta["shape"].index(-1)) for cut in self._cuts if -1 in cut.meta["shape"])
        asked, here = self._one_image(source)[axis], self._one_image(cut)[growing]
        size = self._graph.call_function(aten.sym_size.int, (self._made[cut], growing))
        if here != 1:
            size = self._graph.call_function(operator.floordiv, (size, here))
        return size if asked == 1 else self._graph.call_function(operator.mul, (size, asked))

    def _one_image(self, node: Node) -> tuple[int, ...]:
        if self._of_one_image is None:
            shapes: dict[Node, tuple[int, ...]] = {}
            nodes = list(self._module.graph.nodes)
            image = next(each for each in nodes if each.op == "placeholder")
            taps = {each.name: [lambda x, each=each: _hold(shapes, each, x)] for each in nodes}
            example = next(self._module.parameters())
            with torch.inference_mode():
                images = torch.zeros(1, *image.meta["shape"][1:], dtype=image.meta["dtype"], device=example.device)
                TappedInterpreter(self._module, self._module.graph, taps, quantized=False).run(images)
            self._of_one_image = shapes
        return self._of_one_image[node]


def _hold(shapes: dict[Node, tuple[int, ...]], node: Node, x: Any) -> None:
    if isinstance(x, Tensor):
        shapes[node] = tuple(x.shape)


def _share(source: nn.Module, into: nn.Module, target: str) -> None:
    """Register the tensor or submodule that `source` has as `target` in `into` under the same name, without a copy."""
    *path, last = target.split(".")
    for part in path:
        source = getattr(source, part)
        if not hasattr(into, part):
            into.add_module(part, nn.Module())
        into = getattr(into, part)
    held = getattr(source, last)
    if hasattr(into, last):
        return
    if isinstance(held, nn.Parameter):
        into.register_parameter(last, held)
    elif isinstance(held, Tensor):
        into.register_buffer(last, held, persistent=False)
    else:
        into.add_module(last, held)

"""A float model as one plain graph, with the sites and values found in it, and any part of it as a module."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from vitquant.autocast import autocasts, own_precision
from vitquant.errors import CaptureError
from vitquant.graph.index import GraphIndex
from vitquant.graph.outputs import matched, named_tensors, output_names
from vitquant.graph.plain import plain, rebuilt
from vitquant.graph.segments import Segment, boundary, segment
from vitquant.graph.sites import Site, Value, is_float
from vitquant.graph.taps import Tap, TappedInterpreter, Taps

_GRAPH = "graph_module"


class CapturedModel(nn.Module):
    """An unmodified model's graph, and the sites and values found in it.

    It is called like the model that it was made from and returns the same output type.

    Arguments:
        graph_module: what `capture` returned.
        input_shape: (channels, height, width) of the images.
        index: the graph's index, where it has been made already; made here otherwise.

    Attributes:
        graph_module: the graph; its parameters have the float model's state-dict keys.
        index: its sites and values, and which of them a name means.
    """

    graph_module: GraphModule

    def __init__(
        self, graph_module: GraphModule, input_shape: tuple[int, int, int], index: GraphIndex | None = None
    ) -> None:
        super().__init__()
        self.graph_module, self.input_shape = graph_module, input_shape
        self.index = GraphIndex.of(graph_module) if index is None else index
        self.eval()

    @property
    def sites(self) -> tuple[Site, ...]:
        """The operations that can be quantized, in graph order."""
        return self.index.sites

    @property
    def values(self) -> tuple[Value, ...]:
        """The tensors that the sites read."""
        return self.index.values

    @cached_property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the float tensors that the model gives, by name, see `outputs.named_tensors`.

        -1 stands for a size that grows with the batch.
        """
        results = next(node.args[0] for node in self.graph_module.graph.nodes if node.op == "output")
        named: Any = zip(output_names(self.graph_module), results, strict=True)
        return {name: tuple(node.meta["shape"]) for name, node in named if is_float(node)}

    def named_outputs(self, output: Any) -> dict[str, torch.Tensor]:
        """The float tensors in an output of this model, of its float model or of its program, by name.

        Raises:
            ModelError: see `outputs.matched`.
        """
        return matched(named_tensors(output), tuple(self.outputs))

    def forward(self, images: torch.Tensor | None = None, **named: torch.Tensor) -> Any:
        """The model's output for images (batch, channels, height, width), of the library's own type.

        Autocast has no effect: the output is computed in the model's own precision, as in evaluation.

        Arguments:
            images: float (batch, channels, height, width).
            named: the images as a keyword, by the name of the model's own first argument.

        Raises:
            CaptureError: the images have another size than those that the model was captured for.
        """
        first = () if images is None else (images,)
        for each in (*first, *named.values()):
            self._check_shape(each)
            if autocasts(each.device.type):
                return self._in_own_precision(*first, **named)
        return self.graph_module(*first, **named)

    def _in_own_precision(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """The output computed without autocast, of images that autocast may have cast to half precision."""
        own = next(each.dtype for each in self.parameters() if each.is_floating_point())
        kind = (*args, *kwargs.values())[0].device.type
        with own_precision(kind):
            return self.graph_module(*(x.to(own) for x in args), **{name: x.to(own) for name, x in kwargs.items()})

    def _check_shape(self, images: torch.Tensor) -> None:
        if tuple(images.shape[1:]) != self.input_shape:
            expected, found = ("x".join(map(str, shape)) for shape in (self.input_shape, images.shape[1:]))
            raise CaptureError(f"the model was captured for images of {expected}, these are {found}; resize them")

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and copy.deepcopy take: the graph as plain data, names, shapes and output type included."""
        state = dict(super().__getstate__())
        others = {name: module for name, module in self._modules.items() if name != _GRAPH}
        return {**state, "_modules": others, _GRAPH: plain(self.graph_module)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        described = state.pop(_GRAPH)
        super().__setstate__(state)
        self._modules = {_GRAPH: rebuilt(described), **self._modules}

    def run(self, images: torch.Tensor, taps: Taps) -> Any:
        """The output, calling `taps[name]` with each named value.

        Arguments:
            images: (batch, channels, height, width).
            taps: by the names of values.

        Pitfall: a tap's tensor is valid only during the call. Without gradients a later operation may overwrite it;
            to keep it, clone it.
        """
        return self._run(images, taps, quantized=True)

    def segment(self, inputs: str | Sequence[str], outputs: str | Sequence[str]) -> Segment:
        """The part of the model between input tensors and output tensors, as a module that shares its parameters.

        Arguments:
            inputs, outputs: names of tensors: `images`, a site's name for what it computes, `SITE:OPERAND` for what
                it reads; see `segments.segment`.

        Raises:
            CaptureError: there is no such tensor, or the inputs do not separate the graph.
        """
        return segment(self.graph_module, self.index, inputs, outputs)

    def boundary(self, sites: Iterable[Site]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of the inputs and of the outputs of the part of the model that some sites span, for `segment`.

        `model.segment(*model.boundary(model.index.blocks[3]))` is the fourth block.
        """
        return boundary(self.graph_module, self.index, sites)

    def parameter(self, value: Value) -> torch.Tensor:
        """The stored parameter of a value.

        Raises:
            KeyError: the value is not a stored parameter.
        """
        if value.parameter is None:
            raise KeyError(value.name)
        return attrgetter(value.parameter)(self.graph_module)

    def _run(self, images: torch.Tensor, taps: Taps, quantized: bool | Collection[str]) -> Any:
        self._check_shape(images)
        by_node: dict[str, list[Tap]] = {}
        for name, tap in taps.items():
            by_node.setdefault(self.index.value(name).node, []).append(tap)
        with own_precision(images.device.type):
            return TappedInterpreter(self.graph_module, self.graph_module.graph, by_node, quantized).run(images)

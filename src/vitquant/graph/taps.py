"""Run a captured graph, or a part of one, with all, some or none of its quantizers, and observe tensors on the way."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Interpreter, Node

from vitquant.graph.operators import PRODUCTS, aten, calls

Tap = Callable[[torch.Tensor], None]
Taps = Mapping[str, Tap]


def by_image(x: torch.Tensor, axis: int, images: int) -> torch.Tensor:
    """A tensor whose `axis` grows with the batch, as (images, parts, ...): parts are windows of an image, or 1."""
    return x.movedim(axis, 0).unflatten(0, (images, -1))


class TappedInterpreter(Interpreter):
    """Runs a graph node by node and passes some of the tensors to taps.

    Arguments:
        module: the module that has the graph's targets as attributes.
        graph: captured, perhaps with quantizers and integer operations, each of which has a float `reference`.
        taps: functions by the name of a node, called with its result.
        quantized: whether quantizers and integer operations are active, or the targets of the quantizers that are; in
            the latter case all operations are computed in float.

    Fused attention never writes scores and probabilities to memory; here they are needed, but scores, scaled scores and
    probabilities need not be three tensors. Writing to fresh memory costs several times as much as computing or
    observing them, so that without gradients scale and softmax overwrite their input where nothing else reads it.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: Graph,
        taps: Mapping[str, list[Tap]],
        quantized: bool | Collection[str],
    ) -> None:
        super().__init__(module, graph=graph)
        self.extra_traceback = False  # it would append a page of graph to a one-line message
        self._taps, self._quantized = taps, quantized

    def run_node(self, n: Node) -> Any:
        result = self._overwrite(n)
        if result is None:
            result = super().run_node(n)
        for tap in self._taps.get(n.name, ()):
            tap(result)
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        called: Any = self.fetch_attr(str(target))
        if self._quantized is True or (self._quantized and target in self._quantized):
            return called(*args, **kwargs)
        return called.reference(*args)

    def _overwrite(self, n: Node) -> torch.Tensor | None:
        """The node's result in its argument's memory; None where that is not possible."""
        if torch.is_grad_enabled() or not n.args or not isinstance(n.args[0], Node) or len(n.args[0].users) > 1:
            return None
        source = n.args[0]
        if calls(n, {aten.mul}) and calls(source, PRODUCTS) and isinstance(n.args[1], float):
            return self.env[source].mul_(n.args[1])
        if calls(n, {aten.softmax}) and len(n.args) == 2 and _is_scaled_product(source):
            scores = self.env[source]
            return aten._softmax.out(scores, n.args[1], False, out=scores)
        return None


def _is_scaled_product(node: Node) -> bool:
    return calls(node, {aten.mul}) and isinstance(node.args[1], float) and calls(node.args[0], PRODUCTS)  # type: ignore[arg-type]

"""Run a captured graph, looking at tensors on the way, with all of its quantizers, with some, or with none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from vitquant.graph.operators import PRODUCTS, aten, calls
from vitquant.operations import IntegerOperation


def behind(module: GraphModule, targets: Collection[str]) -> set[Node]:
    """Everything that the modules of these targets have an effect on, themselves among it."""
    found: set[Node] = set()
    for node in module.graph.nodes:
        if (node.op == "call_module" and node.target in targets) or any(each in found for each in node.all_input_nodes):
            found.add(node)
    return found


def by_image(x: torch.Tensor, axis: int, images: int) -> torch.Tensor:
    """A tensor whose axis grows with the batch, as (images, parts, ...): parts are windows, or one."""
    return x.movedim(axis, 0).unflatten(0, (images, -1))


class TappedInterpreter(Interpreter):
    """Runs a graph node by node, showing some of the tensors on the way.

    Arguments:
        module: a captured graph with quantizers in it.
        taps: by the name of a node, called with what it gives.
        quantized: whether quantizers and integer operations do anything, or the targets of those quantizers that do;
            with those, all operations are in float.

    Fused attention never writes scores and probabilities; here they are needed, but not in three tensors.
    Writing to fresh memory costs several times what computing or observing them does, so without gradients the
    scale and the softmax overwrite what only they read.
    """

    def __init__(
        self,
        module: GraphModule,
        taps: Mapping[str, list[Callable[[torch.Tensor], None]]],
        quantized: bool | Collection[str],
    ) -> None:
        super().__init__(module)
        self.extra_traceback = False  # it would add a page to a message of one line
        self._taps, self._quantized = taps, quantized

    def resume(self, known: Mapping[str, Any]) -> Any:
        """The output, computing only what stands behind the quantizers that do something.

        Arguments:
            known: by the name of a node, what is read there and stands before them.
        """
        assert isinstance(self.module, GraphModule)
        assert not isinstance(self._quantized, bool)
        changed = behind(self.module, self._quantized)
        before = {node for node in self.module.graph.nodes if node not in changed and node.op != "get_attr"}
        return self.run(initial_env={node: known.get(node.name) for node in before})

    def run_node(self, n: Node) -> Any:
        result = self._overwrite(n)
        if result is None:
            result = super().run_node(n)
        for tap in self._taps.get(n.name, ()):
            tap(result)
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        called = self.fetch_attr(str(target))
        if self._quantized is True or (self._quantized and target in self._quantized):
            return called(*args, **kwargs)
        return called.reference(*args) if isinstance(called, IntegerOperation) else args[0]

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

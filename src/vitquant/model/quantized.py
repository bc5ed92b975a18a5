"""A captured model with quantizers on the operands of its sites."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from vitquant.errors import CalibrationError, CaptureError, ModelError
from vitquant.graph.captured import CapturedModel
from vitquant.graph.operators import PRODUCTS, calls
from vitquant.graph.segments import QUANTIZERS, Segment, downstream_segment, is_quantizer, segment
from vitquant.graph.taps import Taps
from vitquant.graph.walk import nodes_by_name, origin
from vitquant.integer_modules import Arithmetic, IntegerOperation
from vitquant.integer_modules.replacement import (
    operation_at,
    prepare_operations,
    reconnect_operations,
    replace_operations,
)
from vitquant.quantizers import Quantizer
from vitquant.recipe import Assignment, Bits, Recipe, assign

_NO_TORCHSCRIPT = (
    "torch.jit.trace would fix the size of the batch, and TorchScript is deprecated; "
    "use torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},))"
)


@dataclass(frozen=True)
class Record:
    """The result of a method's run, for the report; it is saved with the model.

    Arguments:
        method: the name of the method.
        summary: facts about the whole run, plain JSON values.
        decisions: what the method decided for each value or site, by its name, plain JSON values.
    """

    method: str
    summary: Mapping[str, Any] = field(default_factory=dict)
    decisions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class QuantizedModel(CapturedModel):
    """A captured model with the quantizers that a recipe assigns to the operands of its sites.

    It is called like the model that it was made from and returns the same output type. Until the recipe's
    methods have run it has no quantizers, and calling it is an error.

    Arguments:
        captured: the float model; its graph and parameters become this model's.
        recipe: which operand gets which spec.
        bits: the bit widths for the recipe's symbols.

    Attributes:
        assignments: spec, observer and rule of each value, by its name, from the recipe.
        arithmetic: how softmax, LayerNorm and activations are computed on codes; None when all of them are in float.
        float_reasons: why a site stays in float although `arithmetic` asks for integers, by the site's name.
        records: the record of each method that has run, in order.
        provenance: source, preprocessing and calibration data, plain JSON values, saved with the model.

    Raises:
        RecipeError: the recipe does not fit the model.
        CaptureError: the graph has no product of activations, hence no attention; or no output of floating point.
    """

    def __init__(self, captured: CapturedModel, recipe: Recipe, bits: Bits) -> None:
        super().__init__(captured.graph_module, captured.input_shape, captured.index)
        self.recipe, self.bits = recipe, bits
        if not any(calls(node, PRODUCTS) for node in self.graph_module.graph.nodes):
            raise CaptureError("the model has no attention (no matrix product of activations): is it a transformer?")
        if not self.outputs:
            raise CaptureError("the model gives no tensor of floating point; let it give what its numbers come from")
        self.assignments: dict[str, Assignment] = assign(recipe, bits, self.values)
        self.arithmetic: Arithmetic | None = None
        self.float_reasons: dict[str, str] = {}
        self.records: list[Record] = []
        self.provenance: dict[str, Any] = {}
        self._calibrated = not self.quantized_names
        self.graph_module.register_load_state_dict_post_hook(_prepare)

    def forward(self, images: torch.Tensor | None = None, **named: torch.Tensor) -> Any:
        """The quantized model's output, see `CapturedModel.forward`.

        Raises:
            CalibrationError: a quantizer is missing.
            CaptureError: the images have another size; or torch.jit.trace is running, which would fix the batch size.

        Pitfall: integer operations check at every call that their constants belong to their scales. A compiled or
            exported model cannot check this: change scales before, by `insert` or `load_state_dict`, or directly and
            then call the model once.
        """
        if torch.jit.is_tracing():
            raise CaptureError(_NO_TORCHSCRIPT)
        if not self._calibrated:
            self.require_calibrated()
        return super().forward(images, **named)

    def __prepare_scriptable__(self) -> NoReturn:
        raise CaptureError(_NO_TORCHSCRIPT)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedModel:
        def kept(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and _rounds(tensor, moved):
                raise ModelError(
                    f"a quantized model computes in {_dtype(tensor)}, as it was evaluated, and {_dtype(moved)} would "
                    f"round its numbers; cast the float model before quantizing it"
                )
            return moved

        return super()._apply(kept, recurse)

    def require_calibrated(self) -> None:
        """Raise an error unless the model has all of its quantizers.

        Raises:
            CalibrationError: a quantizer is missing; the message names the first.
        """
        present = self.quantizers
        missing = [name for name in self.quantized_names if name not in present]
        if missing:
            raise CalibrationError(
                f"{missing[0]} is not calibrated, one of {len(missing)} operands: run the recipe's methods first"
            )

    @property
    def quantized_names(self) -> list[str]:
        """The names of the values that the recipe quantizes."""
        return [name for name, assignment in self.assignments.items() if assignment.spec is not None]

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """The quantizers that the model has so far, by the name of their value."""
        targets = [str(node.target) for node in self.graph_module.graph.nodes if is_quantizer(node)]
        return {target.removeprefix(f"{QUANTIZERS}."): self.graph_module.get_submodule(target) for target in targets}  # type: ignore[return-value]

    @property
    def image_quantizer(self) -> Quantizer | None:
        """The quantizer of the images, perhaps rearranged or padded before it; None if they have none."""
        for node in self.graph_module.graph.nodes:
            if is_quantizer(node) and origin(node.all_input_nodes[0]).op == "placeholder":
                return self.graph_module.get_submodule(str(node.target))  # type: ignore[return-value]
        return None

    @property
    def integer_operations(self) -> dict[str, IntegerOperation]:
        """The operations that are computed on codes, by the name of their site."""
        nodes = nodes_by_name(self.graph_module.graph)
        found = {site.name: operation_at(self.graph_module, nodes[site.node]) for site in self.sites}
        return {name: operation for name, operation in found.items() if operation is not None}

    def insert(self, quantizers: Mapping[str, Quantizer]) -> None:
        """Insert quantizers for values, each for all readers of its value, and replace those that are present.

        Arguments:
            quantizers: by the name of the value; each maps a tensor of the value's shape to one of the same shape.

        Pitfall: every call compiles the graph again, which takes longer than a forward pass of a small model;
            insert all quantizers in one call where possible.
        """
        graph, present = self.graph_module.graph, self.quantizers
        nodes = nodes_by_name(graph)
        for name, quantizer in quantizers.items():
            value = self.index.value(name)
            target, node = f"{QUANTIZERS}.{value.name}", nodes[value.node]
            if not self.graph_module.add_submodule(target, quantizer):
                raise CaptureError(f"a quantizer cannot be named {target}: the model has an attribute of that name")
            if value.name not in present:
                _route_through(graph, node, target)
        reconnect_operations(self.graph_module)
        prepare_operations(self.graph_module)
        self.graph_module.recompile()
        self._calibrated = self.quantizers.keys() >= set(self.quantized_names)

    def compute_in_integers(self, arithmetic: Arithmetic) -> None:
        """Compute softmax, LayerNorm and activations on codes, wherever their quantizers allow it.

        The operations always use the quantizers' current scales. `float_reasons` says which sites stay in float, and
        why.

        Arguments:
            arithmetic: how each kind of operation is computed.

        Raises:
            CalibrationError: a quantizer is missing, or this method was called before.
        """
        self.require_calibrated()
        if self.arithmetic is not None:
            raise CalibrationError("the model computes in integers already; quantize it again for another arithmetic")
        self.float_reasons = replace_operations(self.graph_module, self.sites, arithmetic)
        prepare_operations(self.graph_module)
        self.arithmetic = arithmetic
        self.graph_module.recompile()

    def run(self, images: torch.Tensor, taps: Taps, quantized: bool | Collection[str] = True) -> Any:
        """The output, calling `taps[name]` with each named value before its quantizer.

        Arguments:
            images: (batch, channels, height, width).
            taps: by the names of values.
            quantized: True uses all quantizers and integer operations, False none; names of values use the quantizers
                of these values only.

        Pitfall: a tap's tensor is valid only during the call. Without gradients a later operation may overwrite it;
            to keep it, clone it.
        """
        return self._run(images, taps, self._active(quantized))

    def segment(
        self, inputs: str | Sequence[str], outputs: str | Sequence[str], quantized: bool | Collection[str] = True
    ) -> Segment:
        """The part of the model between input and output tensors, with its quantizers; see `CapturedModel.segment`.

        Arguments:
            inputs, outputs: names of tensors.
            quantized: as for `run`.

        Raises:
            CaptureError: there is no such tensor, or the inputs do not separate the graph.
        """
        return segment(self.graph_module, self.index, inputs, outputs, self._active(quantized))

    def downstream_segment(self, values: Collection[str], outputs: Sequence[str]) -> Segment:
        """The part of the model that depends on the quantizers of some values, up to some outputs, all else in float.

        Its inputs are the tensors that these quantizers read, by names that `segment` takes: computed once in float,
        they serve every choice of scales or bits of these values.

        Arguments:
            values: names of values.
            outputs: names of tensors.

        Raises:
            CaptureError: there is no such tensor, or no output depends on these quantizers.
        """
        return downstream_segment(self.graph_module, self.index, self._targets(values), outputs)

    def _active(self, quantized: bool | Collection[str]) -> bool | set[str]:
        return quantized if isinstance(quantized, bool) else self._targets(quantized)

    def _targets(self, names: Collection[str]) -> set[str]:
        return {f"{QUANTIZERS}.{self.index.value(name).name}" for name in names}

    def save(self, directory: str | Path, force: bool = False) -> None:
        """Write the model into a directory, see `saved_model.save`."""
        from vitquant.model.saved import save  # imported here: `saved` imports this module

        save(self, directory, force)


def _route_through(graph: Graph, node: Node, target: str) -> None:
    """Insert a call of the module `target` on `node`, and let all readers of `node` read its result instead."""
    with graph.inserting_after(node):
        call = graph.call_module(target, (node,))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)


def _prepare(module: nn.Module, incompatible: object) -> None:
    """A hook for torch to call after a state dict was loaded into the graph, which may have changed scales."""
    assert isinstance(module, GraphModule)
    prepare_operations(module)


def _rounds(tensor: torch.Tensor, moved: torch.Tensor) -> bool:
    """Whether a cast loses precision, of the stored numbers or of what will be computed with them."""
    if torch.promote_types(tensor.dtype, moved.dtype) == moved.dtype:
        return False
    return moved.itemsize < 4 or moved.is_meta or not torch.equal(moved.to(tensor), tensor)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

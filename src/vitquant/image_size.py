"""A quantized model captured again for images of another size, with the scales that it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from vitquant.autocast import in_own_precision
from vitquant.errors import CaptureError, CheckpointError, LoweringError, RecipeError
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.graph.layer_norm_folding import NotFoldableError, foldable_norm
from vitquant.graph.walk import nodes_by_name
from vitquant.lowering import lower
from vitquant.model import QuantizedModel
from vitquant.model.state import put_state, state_of
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.unwrapping import unwrapped
from vitquant.zoo import ModelSource

_ANY_SIZE = "give a model that takes images of any size, such as timm's with dynamic_img_size=True"
_AGAIN = "quantize the model at that size"


@in_own_precision
def at_image_size(
    quantized: QuantizedModel, model: nn.Module, size: int | Sequence[int], source: ModelSource | None = None
) -> QuantizedModel:
    """A quantized model for images of another size: its weights, scales and integer arithmetic on a new capture.

    Nothing is calibrated: the ranges are those of the images that it was calibrated on.

    Arguments:
        quantized: calibrated; left as it is.
        model: the float model, or one of the same architecture that takes images of any size; left as it is, and its
            weights do not matter.
        size: (height, width) in pixels, or one number for both.
        source: where `model` comes from, where that is another than what the quantized model says (such as with
            `dynamic_img_size`); with it `load(directory)` needs nothing else.

    Raises:
        CaptureError: the model refuses images of that size, or there it is another computation, has parameters of other
            shapes, or tensors for which a scale does not fit; it names the first.
        LoweringError: the quantized model is computed in integers, and cannot be at that size.
        CalibrationError: a quantizer is missing.

    Pitfall: what was learned at one size is not what would be learned at another; docs/image-size.md measures it.
    """
    quantized.require_calibrated()
    sizes = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sizes) != 2 or not all(type(each) is int and each >= 1 for each in sizes):
        raise CaptureError(
            f"no image has the size {size}: give (height, width) in whole pixels, or one number for both"
        )
    shape = (quantized.input_shape[0], *sizes)
    where = f"at {shape[1]} x {shape[2]} pixels"
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, *shape, generator=generator).to(next(quantized.parameters()))
    captured = CapturedModel(capture(unwrapped(model), example), shape)
    _refuse_other_sites(quantized, captured, where)
    _refuse_padding_of_shifted(quantized, captured, where)
    try:
        found = QuantizedModel(captured, quantized.recipe, quantized.bits)
    except RecipeError as error:
        raise CaptureError(f"{where} the recipe does not fit: {error}; {_AGAIN}") from None
    _refuse_other_specs(quantized, found, where)
    # Tables of indices and conditions are made by the model's code for its image size, and no method changes them.
    tables = {name: x for name, x in found.graph_module.state_dict().items() if not x.is_floating_point() and x.ndim}
    try:
        put_state(found, {**state_of(quantized), **tables}, where)
    except CheckpointError as error:
        problem = str(error).partition(";")[0]  # what it says to do is about files
        raise CaptureError(f"{problem}; {_ANY_SIZE}, or {_AGAIN}") from None
    if quantized.arithmetic is not None:
        found.compute_in_integers(quantized.arithmetic)
    found.records = list(quantized.records)
    found.provenance = {**quantized.provenance, **_provenance(quantized, shape, source)}
    if _lowers(quantized):
        lower(found)
    return found


def _refuse_other_sites(quantized: QuantizedModel, captured: CapturedModel, where: str) -> None:
    """Refuse a capture that is another computation, as of a Swin whose windows an image of that size does not fill."""
    before, after = ({value.name: value for value in each.values} for each in (quantized, captured))
    for name in [*before, *after]:
        if name not in before or name not in after:
            has = "has not" if name in before else "has"
            raise CaptureError(f"{where} the model is another computation: it {has} {name}; {_AGAIN}")
    kinds = {site.name: site.kind for site in quantized.sites}
    for site in captured.sites:
        if kinds.get(site.name) != site.kind:
            raise CaptureError(f"{where} the model is another computation: {site.name} is {site.kind}; {_AGAIN}")


def _refuse_padding_of_shifted(quantized: QuantizedModel, captured: CapturedModel, where: str) -> None:
    """Refuse zeros beside the output of a LayerNorm that a method shifted: they would stand for other numbers."""
    nodes = nodes_by_name(captured.graph_module.graph)
    methods = {
        name: record.method
        for record in quantized.records
        for name, decision in record.decisions.items()
        if decision.get("shifted")
    }
    for site in captured.sites:
        if site.name in methods and not _is_shiftable(captured, nodes[site.node]):
            raise CaptureError(
                f"{where} zeros are put beside the result of {site.name}, which {methods[site.name]} shifted; take a "
                f"size that the windows divide, or {_AGAIN}"
            )


def _is_shiftable(captured: CapturedModel, norm: Node) -> bool:
    try:
        return foldable_norm(captured.graph_module, norm).shiftable
    except NotFoldableError:
        return False


def _refuse_other_specs(quantized: QuantizedModel, found: QuantizedModel, where: str) -> None:
    for name, assignment in quantized.assignments.items():
        if found.assignments[name].spec != assignment.spec:
            raise CaptureError(f"{where} the recipe gives {name} another quantizer; {_AGAIN}")


def _provenance(quantized: QuantizedModel, shape: tuple[int, int, int], source: ModelSource | None) -> dict[str, Any]:
    """What is otherwise of a model at another size."""
    steps = quantized.provenance.get("preprocessing")
    changed: dict[str, Any] = {} if source is None else {"source": source.to_dict()}
    calibration = quantized.provenance.get("calibration")
    if calibration is not None:
        changed["calibration"] = {"input_shape": list(quantized.input_shape), **calibration}  # the first stays
    if steps is not None:
        changed["preprocessing"] = replace(Preprocessing.from_dict(steps), input_size=shape).to_dict()
    return changed


def _lowers(model: QuantizedModel) -> bool:
    try:
        lower(model)
    except LoweringError:
        return False
    return True

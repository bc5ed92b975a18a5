"""Run the methods of a recipe one after another, and continue where a killed run stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from vitquant.calibration_data import CalibrationData
from vitquant.errors import CalibrationError, first_line
from vitquant.graph.captured import CapturedModel
from vitquant.methods.context import Context
from vitquant.methods.contract import Phase
from vitquant.methods.table import Step
from vitquant.model import QuantizedModel, Record
from vitquant.model.checkpoint import DIGEST
from vitquant.model.config import RECORD
from vitquant.model.saved import finite
from vitquant.model.state import put_state, state_of
from vitquant.schema import Integer, Table, maybe
from vitquant.work import Saved, WorkDirectory, WorkState

_DONE = Table({"record": RECORD, "data": maybe(Table({"images": Integer(0), "sha256": DIGEST}))})


def run_steps(model: QuantizedModel, steps: Sequence[Step], context: Context, work: WorkDirectory | None) -> None:
    """Run methods on a model, and save its state after each.

    Arguments:
        model: without quantizers; changed in place.
        steps: in the order in which they run.
        context: passed to each, with a `work` of its own.
        work: where the state is saved, and where a killed run saved its own; None saves nothing.

    Raises:
        CheckpointError: the saved state is damaged, or is not of this model.
        VitquantError: raised by a method.
    """
    names = [f"{number}-{step.name}" for number, step in enumerate(steps, 1)]
    done, kept = 0, None
    for number, name in enumerate(names, 1):
        if work is not None and (saved := work.read(name, _DONE)) is not None:
            done, kept = number, saved
            model.records.append(Record(**saved.values["record"]))
    if kept is not None:
        _put(model, context, kept)
    for name, step in list(zip(names, steps, strict=True))[done:]:
        state = WorkState(work, f"{name}.part")
        model.records.append(step.run(model, replace(context, work=state)))
        if context.out_of_time:  # a later run continues the method that was cut short, and repeats those after it
            work = None
        if work is not None and step.definition.phase < Phase.INTEGERS:
            values = {"record": finite(asdict(model.records[-1])), "data": _seen(context)}
            work.write(name, _tensors(model, context), values)
            work.remove(state.name)


def check_gradients(model: CapturedModel, example: torch.Tensor, steps: Sequence[Step]) -> None:
    """Refuse a model that torch cannot differentiate if a method needs gradients, before any work is done.

    Arguments:
        model: the float model.
        example: images (batch, channels, height, width).
        steps: of the recipe.

    Raises:
        CalibrationError: torch cannot differentiate the model; the message names the method and quotes torch.
    """
    name = next((step.name for step in steps if step.definition.needs.gradients), None)
    if name is None:
        return
    if any(each.is_inference() for each in model.parameters()):
        raise CalibrationError(
            f"{name}: a model of torch.inference_mode() has no gradients: quantize it outside of that"
        )
    outputs = [site.name for site in model.sites if site.kind == "output"]
    with torch.inference_mode(False), torch.enable_grad():
        images = example[:1].clone().requires_grad_(True)
        try:
            torch.stack([each.sum() for each in model.segment("images", outputs)(images)]).sum().backward()
        except RuntimeError as refused:
            raise CalibrationError(
                f"{name}: torch computes no gradients of this model: {first_line(refused)}; leave {name} out of the "
                "recipe"
            ) from refused
    for each in model.parameters():
        each.grad = None


def _tensors(model: QuantizedModel, context: Context) -> dict[str, torch.Tensor]:
    tensors = {f"model/{name}": each for name, each in state_of(model).items()}
    if context.teacher is not None:  # rewrites may have changed it
        tensors |= {f"teacher/{name}": each for name, each in context.teacher.graph_module.state_dict().items()}
    return tensors


def _put(model: QuantizedModel, context: Context, saved: Saved) -> None:
    prefix = "model/"
    of_model = {key.removeprefix(prefix): each for key, each in saved.tensors.items() if key.startswith(prefix)}
    put_state(model, of_model, str(saved.file))
    if context.teacher is not None:
        module = context.teacher.graph_module
        module.load_state_dict({name: saved.tensor(f"teacher/{name}", x) for name, x in module.state_dict().items()})
    if isinstance(context.data, CalibrationData):
        seen = saved.values["data"]
        if seen is None:
            raise saved.damaged()
        context.data.images, context.data.digest = seen["images"], seen["sha256"]


def _seen(context: Context) -> dict[str, Any] | None:
    """The number and the digest of the images that were read so far; None if `data` does not keep them."""
    if not isinstance(context.data, CalibrationData):
        return None
    return {"images": context.data.images, "sha256": context.data.digest}

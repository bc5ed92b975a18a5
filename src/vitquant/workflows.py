"""What is done with a model, as the command line does it: quantize, evaluate, compare, export."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from vitquant.autocast import in_own_precision
from vitquant.calibration_data import Batch, CalibrationData, images_of
from vitquant.engines import default_engine, engine, forms_of
from vitquant.errors import CalibrationError, ExportError, RecipeError
from vitquant.exports.formats import check_options, kind_of, write
from vitquant.files import discard, replacing
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.lowering import check_possible, check_promise
from vitquant.methods.context import Context
from vitquant.methods.running import check_gradients, run_steps
from vitquant.methods.table import passes, planned
from vitquant.model import QuantizedModel
from vitquant.model.checkpoint import digest_of
from vitquant.parity import Form, ParityReport, examine
from vitquant.progress import Progress, silent
from vitquant.recipe import Recipe, requested
from vitquant.recipe.override import Settings
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.tasks.task import Model, Result, Task, task_named, task_of
from vitquant.unwrapping import unwrapped
from vitquant.work import WorkDirectory
from vitquant.zoo import ModelSource


class BrokenPromiseError(ExportError):
    """An export is not what was evaluated, and was not written.

    Arguments:
        report: the comparison.
    """

    def __init__(self, report: ParityReport) -> None:
        super().__init__(f"nothing was written, since promises are broken: {'; '.join(report.broken)}")
        self.report = report


@in_own_precision
def quantize(
    model: nn.Module,
    recipe: str | Recipe,
    data: Iterable[Batch],
    *,
    bits: str | None = None,
    settings: Settings = (),
    simulated: bool = False,
    source: ModelSource | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    task: str | None = None,
    seed: int = 0,
    progress: Progress = silent,
    memory: float = 4.0,
    time_limit: float = math.inf,
    work: str | Path | None = None,
) -> QuantizedModel:
    """Quantize a model by a recipe; the model itself is left as it is.

    Arguments:
        model: any module that takes one batch of images; it is captured in evaluation mode, see `capture`.
        recipe: a recipe's name, the path of a TOML file, names joined by `+` to lay overlays over a
            recipe, or a `Recipe`; `default` is the best that lowers to integers at these bits.
        data: calibration batches: float tensors (batch, channels, height, width), or tuples that begin
            with one, or mappings with `pixel_values`. A recipe of several methods reads them several times, which
            a list or a DataLoader allows and a generator does not; image size is that of the first.
        bits: replaces the recipe's, such as "w8a8s4".
        settings: replaces single keys of the recipe: {"weights.observer": "omse"}, or ["weights.observer=omse"].
        simulated: take the model also where its recipe promises integers and some of it cannot be computed so.
        source: where the model came from; with it `load(directory)` needs nothing else.
        preprocessing: the model's, timm's data-configuration keys; saved with the model.
        task: what the outputs mean, one of `tasks.task.TASKS`; when None, `classification` where the model gives
            logits, else `features`.
        seed: of what methods draw.
        progress: told what a method is doing, how much of it is done and how much there is.
        memory: gigabytes that a method may hold beside the models; the result does not depend on it.
        time_limit: seconds after which methods that choose or learn for long stop with what they have; their records
            say how far they came.
        work: a directory in which long work keeps its state: after an interruption the same call goes on there. It
            can be removed afterwards.

    Raises:
        LoweringError: the recipe promises integers (its method `integer-operations` computes every kind so), the
            bits, the model or its calibration do not allow it, and not `simulated`; it names the site and what to do.
            Said before calibration wherever that does not depend on the images.
        CheckpointError: the work directory is another run's.
        VitquantError: see `capture`, `requested` and the recipe's methods.
    """
    deadline = time.monotonic() + time_limit
    if not 0 < memory < math.inf:
        raise RecipeError(f"memory = {memory}: it is positive, in gigabytes")
    if not time_limit >= 0:
        raise RecipeError(f"time_limit = {time_limit}: it is seconds, 0 or more")
    said = None if preprocessing is None else Preprocessing.from_dict(preprocessing).to_dict()
    asked_task = None if task is None else task_named(task)
    recipe, widths = requested(recipe, bits, settings)
    steps = planned(recipe)
    model = unwrapped(model)
    stream = CalibrationData(data, next((parameter.device for parameter in model.parameters()), None))
    example = stream.example
    shape = (int(example.shape[1]), int(example.shape[2]), int(example.shape[3]))
    captured = CapturedModel(capture(model, example), shape)
    meaning = asked_task or task_of(model, captured.outputs)
    check_gradients(captured, example, steps)
    teacher = copy.deepcopy(captured) if any(step.definition.needs.teacher for step in steps) else None
    quantized = QuantizedModel(captured, recipe, widths)
    for step in steps:
        step.check(quantized)
    stream.check(passes(steps, quantized), any(step.definition.needs.labels for step in steps))
    if not simulated:
        check_possible(captured, recipe, widths)
    with ExitStack() as held:
        kept = None
        if work is not None:
            asked = {"recipe": recipe.to_dict(), "bits": str(widths), "seed": seed, "images": stream.first}
            asked["task"] = meaning.name
            kept = held.enter_context(WorkDirectory.opened(work, {"model": _digest(captured), **asked}))
        context = Context(stream, stream.labelled(), meaning.error, teacher, seed, progress, memory, deadline)
        run_steps(quantized, steps, context, kept)
    if not simulated:
        check_promise(quantized)
    quantized.provenance = {
        "source": None if source is None else source.to_dict(),
        "preprocessing": said,
        "calibration": {"images": stream.images, "sha256": stream.digest},
        "task": meaning.name,
    }
    return quantized


def evaluate(
    model: QuantizedModel,
    data: Iterable[Any],
    *,
    float_model: Model | None = None,
    engine_name: str | None = None,
    directory: str | Path | None = None,
    task: str | None = None,
    progress: Progress = silent,
) -> Result:
    """How good a quantized model is at its task, beside its float model on the same images.

    A classifier's accuracy and its agreement with the float model; the cosine of features with the float model's, and
    the share of images whose nearest neighbour is the same.

    Arguments:
        model: calibrated.
        data: batches of images, float32 (batch, channels, height, width), for a classifier each with classes, int64
            (batch,).
        float_model: to compare with; features need it.
        engine_name: what computes, one of `engines.ENGINES`; the integer program once the model lowers, else the
            simulation, when None.
        directory: where exports are looked for, which `onnxruntime` and `openvino` run.
        task: one of `tasks.task.TASKS`; when None, the one that the model was quantized for.
        progress: told how many images are done.

    Raises:
        ModelError, DataError: see `tasks.classification.evaluate` and `tasks.features.evaluate`.
        ExportError, LoweringError: see `engines.engine`.
    """
    if engine_name is None:
        engine_name, computed, _ = default_engine(model)
    else:
        computed = engine(engine_name, model, "." if directory is None else directory)
    return task_for(model, task).evaluate(computed, float_model, data, progress, engine_name)


def task_for(model: QuantizedModel, name: str | None = None) -> Task:
    """The task that is asked for, or else the one that a model was quantized for.

    Arguments:
        model: from `quantize` or `load`.
        name: one of `tasks.task.TASKS`, or None.

    Raises:
        DataError: there is no task of that name.
    """
    name = name or model.provenance.get("task")
    return task_of(model, model.outputs) if name is None else task_named(name)


def compare(
    model: QuantizedModel,
    images: Iterable[Batch],
    forms: Sequence[Form] = (),
    *,
    float_model: Model | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Run all forms of a model on the same images: float, simulation, integer program, and what was exported.

    Arguments:
        model: calibrated.
        images: a few batches, as `quantize` takes them; they are held in memory.
        forms: exported ones, from `engines.forms_of`.
        float_model: what the model was made from.
        progress: told which form is run, how many were, and how many there are.

    Returns:
        The comparisons, and `broken`: the promises that do not hold.

    Raises:
        CalibrationError: there are no images.
    """
    batches = [images_of(batch) for batch in images]
    if not batches:
        raise CalibrationError("no images to compare on: give at least one batch")
    return examine(model, batches, forms, float_model, progress, task_for(model).same)


def export(
    model: QuantizedModel,
    format: str,
    path: str | Path,
    images: Iterable[Batch],
    *,
    float_model: Model | None = None,
    force: bool = False,
    float_io: bool = False,
    batch: int | None = None,
    opset: int | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Write a model for another runtime, once it was run there and is what it should be.

    Arguments:
        model: calibrated.
        format, path, force, float_io, batch, opset: see `export.formats.write`.
        images, float_model, progress: see `compare`.

    Returns:
        What the comparison with the model found.

    Raises:
        BrokenPromiseError: the export is not the model; nothing is written.
        ExportError, LoweringError: see `export.formats.write`.
        CalibrationError: there are no images.
    """
    check_options(format, float_io, batch, opset)
    with replacing(path, force, kind_of(format, path)) as new:
        options = {"float_io": float_io, "batch": batch, "opset": opset}
        report = write_compared(model, format, new, images, options, float_model, progress)
    if report.broken:
        raise BrokenPromiseError(report)
    return report


def write_compared(
    model: QuantizedModel,
    format: str,
    new: Path,
    images: Iterable[Batch],
    options: dict[str, Any],
    float_model: Model | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Write an export to a place where nothing is yet, run it, and remove it again where a promise is broken.

    Arguments:
        new: from `files.replacing`.
        options: `float_io`, `batch` and `opset` of `export.formats.write`.
        model, format, images, float_model, progress: see `export`.
    """
    progress("exporting", 0, 1)
    write(model, format, new, **options)
    report = compare(model, images, forms_of(new, format, model), float_model=float_model, progress=progress)
    if report.broken:
        discard(new)
    return report


def _digest(captured: CapturedModel) -> str:
    """Tells float models apart."""
    return digest_of(captured.graph_module.state_dict(), {"graph": captured.index.fingerprint})

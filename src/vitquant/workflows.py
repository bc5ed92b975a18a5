"""The workflows of Python and the command line: quantize, evaluate, compare, export."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitquant.autocast import in_own_precision
from vitquant.calibration_data import Batch, CalibrationData, images_of
from vitquant.engines import default_engine, engine, forms_of
from vitquant.errors import CalibrationError, ExportError, RecipeError
from vitquant.exports.formats import check_options, kind_of, write
from vitquant.files import discard, replacing
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.lowering import check_possible, check_promise
from vitquant.lowering.recomputed_program import RecomputedProgram
from vitquant.methods.context import Context
from vitquant.methods.running import check_gradients, run_steps
from vitquant.methods.table import Step, passes, planned
from vitquant.model import QuantizedModel
from vitquant.model.saved import float_digest
from vitquant.parity import Form, ParityReport, examine
from vitquant.progress import Progress, silent
from vitquant.recipe import Bits, Recipe, requested
from vitquant.recipe.override import Settings
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.tasks.task import Model, Result, Task, task_named, task_of
from vitquant.unwrapping import unwrapped
from vitquant.work import WorkDirectory
from vitquant.workers.opening import asked_workers, opened
from vitquant.zoo import ModelSource


class BrokenPromiseError(ExportError):
    """An export does not compute what was evaluated, and was therefore not written.

    Arguments:
        report: the comparison that shows it.
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
    workers: int | str = 0,
) -> QuantizedModel:
    """Quantize a model by a recipe; the model itself is not changed.

    Arguments:
        model: any module that takes one batch of images; it is captured in evaluation mode, see `capture`.
        recipe: a recipe's name, the path of a TOML file, names joined by `+` to lay overlays over a
            recipe, or a `Recipe`; `default` is the best one that lowers to integers at these bits.
        data: calibration batches: float tensors (batch, channels, height, width), or tuples that begin
            with one, or mappings with `pixel_values`. A recipe with several methods iterates over them several times,
            which a list or a DataLoader allows and a generator does not; the first batch fixes the image size.
        bits: replaces the recipe's bits, such as "w8a8s4".
        settings: replaces single keys of the recipe: {"weights.observer": "omse"}, or ["weights.observer=omse"].
        simulated: accept the model even if its recipe promises integers and it cannot be lowered.
        source: the model's source, with which `load(directory)` needs no further argument.
        preprocessing: of the model, with the keys of timm's data configuration; saved with the model.
        task: how the outputs are evaluated, one of `tasks.task.TASKS`; when None, `classification` if the model returns
            logits, else `features`.
        seed: of the methods' random draws.
        progress: called with a method's current activity, the amount done and the total.
        memory: gigabytes that a method may hold beside the models; the result does not depend on it.
        time_limit: seconds after which long searches and training stop with what they have; their records say how far
            they came.
        work: a directory in which long work saves its state: after an interruption the same call continues there. It
            can be removed afterwards.
        workers: the number of processes that share the work of methods that allow it, or "ray": a Ray cluster. The
            result is the same where they compute with as many threads and on the same kind of processor.

    Raises:
        LoweringError: the recipe promises integers (its method `integer-operations` computes every kind so), the bits,
            the model or its calibration do not allow it, and `simulated` is false; the message names the site and what
            to do. It is raised before calibration if it does not depend on the images.
        CheckpointError: the work directory belongs to another run.
        WorkerError: there are no such workers, or they are lost again and again.
        ModelError: the task is classification, and the model gives no logits.
        VitquantError: see `capture`, `requested` and the recipe's methods.
    """
    deadline = time.monotonic() + time_limit
    if not 0 < memory < math.inf:
        raise RecipeError(f"memory = {memory}: it is positive, in gigabytes")
    asked_workers(workers)
    if not time_limit >= 0:
        raise RecipeError(f"time_limit = {time_limit}: it is seconds, 0 or more")
    said = None if preprocessing is None else Preprocessing.from_dict(preprocessing).to_dict()
    asked_task = None if task is None else task_named(task)
    recipe, widths = requested(recipe, bits, settings)
    steps = planned(recipe)
    model = unwrapped(model)
    stream = CalibrationData(data, next((parameter.device for parameter in model.parameters()), None))
    begun = _begun(model, recipe, widths, steps, stream.example, asked_task, simulated)
    captured, quantized = begun.captured, begun.quantized
    stream.check(passes(steps, quantized), any(step.definition.needs.labels for step in steps))
    with ExitStack() as held:
        kept = None
        if work is not None:
            asked = {"recipe": recipe.to_dict(), "bits": str(widths), "seed": seed, "images": stream.first}
            asked["task"] = begun.task.name
            kept = held.enter_context(WorkDirectory.opened(work, {"model": float_digest(captured), **asked}))
        shares = any(step.definition.needs.workers for step in steps)
        context = Context(
            stream,
            stream.labelled(),
            begun.task.errors(captured.outputs),
            begun.task.logits(captured.outputs),
            begun.teacher,
            seed,
            progress,
            memory,
            deadline,
            integers=RecomputedProgram,
            workers=held.enter_context(opened(workers if shares else 0)),
        )
        run_steps(quantized, steps, context, kept)
    if not simulated:
        check_promise(quantized)
    quantized.provenance = {
        "source": None if source is None else source.to_dict(),
        "preprocessing": said,
        "calibration": {"images": stream.images, "sha256": stream.digest},
        "task": begun.task.name,
    }
    return quantized


@in_own_precision
def check_quantizable(
    model: nn.Module,
    recipe: Recipe,
    bits: Bits,
    input_size: tuple[int, int, int],
    task: str | None = None,
    simulated: bool = False,
) -> None:
    """Refuse what `quantize` would refuse before it reads the images, where these are only made after it.

    Arguments:
        model, task, simulated: see `quantize`.
        recipe, bits: from `requested`.
        input_size: (channels, height, width) of the images.

    Raises:
        RecipeError: the recipe needs the classes of the images, which images that are made do not have.
        VitquantError: see `quantize`.
    """
    steps = planned(recipe)
    model = unwrapped(model)
    like = next((each for each in model.parameters() if each.is_floating_point()), torch.zeros(()))
    example = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0)).to(like)
    _begun(model, recipe, bits, steps, example, None if task is None else task_named(task), simulated)
    labelled = [step.name for step in steps if step.definition.needs.labels]
    if labelled:
        raise RecipeError(
            f"{recipe.name}: {labelled[0]} needs the class of every image, and images that are made have none"
        )


@dataclass(frozen=True)
class _Begun:
    """A model that has passed all checks that need no images, with a copy for methods that need the float model."""

    captured: CapturedModel
    task: Task
    teacher: CapturedModel | None
    quantized: QuantizedModel


def _begun(
    model: nn.Module,
    recipe: Recipe,
    bits: Bits,
    steps: Sequence[Step],
    example: Tensor,
    asked: Task | None,
    simulated: bool,
) -> _Begun:
    shape = (int(example.shape[1]), int(example.shape[2]), int(example.shape[3]))
    captured = CapturedModel(capture(model, example), shape)
    task = asked or task_of(model, captured.outputs)
    task.check(model, captured.outputs)
    check_gradients(captured, example, steps)
    teacher = copy.deepcopy(captured) if any(step.definition.needs.teacher for step in steps) else None
    quantized = QuantizedModel(captured, recipe, bits)
    for step in steps:
        step.check(quantized)
    if not simulated:
        check_possible(captured, recipe, bits)
    return _Begun(captured, task, teacher, quantized)


def evaluate(
    model: QuantizedModel,
    data: Iterable[Any],
    *,
    float_model: Model | None = None,
    engine_name: str | None = None,
    directory: str | Path = ".",
    task: str | None = None,
    progress: Progress = silent,
) -> Result:
    """Evaluate a quantized model on its task, and compare it with its float model on the same images.

    For a classifier the result is the accuracy and the agreement with the float model; for features the cosine
    similarity with those of the float model, and the share of images with the same nearest neighbour.

    Arguments:
        model: calibrated.
        data: batches of images, float32 (batch, channels, height, width), for a classifier each with classes, int64
            (batch,).
        float_model: to compare with; needed for features.
        engine_name: one of `engines.ENGINES`; when None, the integer program if the model can be lowered, else the
            simulation.
        directory: where the exports are that `onnxruntime` and `openvino` run.
        task: one of `tasks.task.TASKS`; when None, the one for which the model was quantized.
        progress: called with the number of images done and the total.

    Raises:
        ModelError, DataError: see `tasks.classification.evaluate` and `tasks.features.evaluate`.
        ExportError, LoweringError: see `engines.engine`.
    """
    if engine_name is None:
        engine_name, computed, _ = default_engine(model)
    else:
        computed = engine(engine_name, model, directory, float_model=float_model)
    return task_for(model, task).evaluate(computed, float_model, data, progress, engine_name)


def task_for(model: QuantizedModel, name: str | None = None) -> Task:
    """The task of a name, or without a name the task for which a model was quantized.

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
    """Run all forms of a model on the same images: float, simulation, integer program, and exported files.

    Arguments:
        model: calibrated.
        images: a few batches, as for `quantize`; all of them are held in memory.
        forms: of exported files, from `engines.forms_of`.
        float_model: the model that was quantized.
        progress: called with the form that is run, how many are done, and how many there are.

    Returns:
        The comparisons, and `broken`: the criteria that are not met.

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
    """Export a model to the format of a runtime, after running the export there and comparing it with the model.

    Arguments:
        model: calibrated.
        format, path, force, float_io, batch, opset: see `exports.formats.write`.
        images, float_model, progress: see `compare`.

    Returns:
        The comparison of the export with the model.

    Raises:
        BrokenPromiseError: the export does not compute the same as the model; nothing is written.
        ExportError, LoweringError: see `exports.formats.write`.
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
    """Write an export to a path that does not exist yet, run it, and remove it again if a criterion is not met.

    Arguments:
        new: the path from `files.replacing`.
        options: `float_io`, `batch` and `opset` of `exports.formats.write`.
        model, format, images, float_model, progress: see `export`.
    """
    progress("exporting", 0, 1)
    write(model, format, new, **options)
    report = compare(model, images, forms_of(new, format, model), float_model=float_model, progress=progress)
    if report.broken:
        discard(new)
    return report

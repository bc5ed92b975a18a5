"""`vitquant evaluate`: a saved model evaluated on its task, compared with its float model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitquant.cli import options
from vitquant.cli.float_model import float_model
from vitquant.cli.terminal import Terminal

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vitquant.model import QuantizedModel

_BATCH = 50  # for the quantized and the float model

Data = Annotated[
    Path,
    typer.Option(
        metavar="DIR", help="Images: for a classifier a labels.csv, or one folder per class; for features any."
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="The task: classification (accuracy) or features (cosine with the float model's, nearest "
        "neighbours); as quantized when not given.",
    ),
]
Classes = Annotated[
    Path | None,
    typer.Option(
        "--classes",
        metavar="FILE",
        help="File that maps folders to classes: lines of folder,class_index, or the names of all classes in order.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Path of the float weights if they were moved, or pretrained to download them; else as saved.",
    ),
]


class Engine(StrEnum):
    """The names of the engines, which compute the outputs."""

    FLOAT = "float"
    SIMULATED = "simulated"
    INTEGER = "integer"
    ONNXRUNTIME = "onnxruntime"
    ONNX_INTEGER = "onnx-integer"
    ONNX_QDQ = "onnx-qdq"
    OPENVINO = "openvino"


EngineName = Annotated[
    Engine | None,
    typer.Option(
        "--engine",
        help="The engine; integer when the model lowers, else simulated, when not given. onnxruntime: the integer "
        "ONNX file, or the QDQ one where there is no other; onnx-integer and onnx-qdq say which.",
    ),
]


def evaluate(
    out: options.Saved,
    data: Data,
    classes: Classes = None,
    batch: options.Batch = _BATCH,
    engine: EngineName = None,
    task: TaskName = None,
    weights: Weights = None,
    model: options.Repeated = None,
    model_arguments: options.RepeatedArguments = None,
    preprocessing: options.PreprocessingFile = None,
    device: options.DeviceOption = options.Device.AUTO,
    image_workers: options.ImageWorkers = 0,
    skip_bad_images: options.SkipBadImages = False,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Evaluate a quantized model at its task, and its float model on the same images."""
    with Terminal(json, quiet) as terminal:
        with terminal.progress("loading"):
            from vitquant import loading
            from vitquant.engines import file_of
            from vitquant.image_folders import evaluation_images, preprocessing_for
            from vitquant.model.checkpoint import read_config
            from vitquant.model.config import check_config
            from vitquant.report.tables import ends_text, facts, result_rows
            from vitquant.tasks.images import batches, load_listing, load_unlabelled
            from vitquant.tasks.task import task_named
            from vitquant.workflows import task_for

            where = options.choose_device(device, threads)
            said = task or check_config(read_config(out), out).get("task")
            if said is not None and not task_named(said).labelled:
                load_unlabelled(data)  # report errors before the model is built
            elif classes is None:  # a file of classes can only be checked with the model
                load_listing(data)
            repeated = options.repeated(model, model_arguments)
            quantized = loading.load(out, **repeated).to(where)
            meaning = task_for(quantized, task)
            reference = float_model(out, weights, repeated, terminal)
            items = evaluation_images(data, quantized, meaning, reference, classes)
            steps = preprocessing_for(quantized, preprocessing)
            found = batches(items, steps, batch or _BATCH, image_workers, skip_bad_images)
            if reference is not None:
                reference = reference.to(where)
            name, computed = _engine(engine, quantized, reference, out, threads, where, terminal)
        with terminal.progress("evaluating", len(found.items)) as update:
            show = partial(_show, update)
            result = meaning.evaluate(computed, reference, found, show, name)
        for note in (*items.notes, *result.notes):
            terminal.note(note)
        if found.skipped:
            first = found.skipped[0]
            terminal.note(f"{len(found.skipped)} images were left out, first: {first.path}: {first.reason}")
        recipe = {"recipe": f"{quantized.recipe.name}, {quantized.bits}", "ends": ends_text(quantized)}
        path = file_of(name, out.absolute())
        file = {} if path is None else {"file": str(path)}
        rows = {**result_rows(result), **file, **recipe}
        terminal.result({"task": meaning.name, **asdict(result), "file": file.get("file")}, facts(rows))


def _show(update: Callable[..., None], what: str, done: int, total: int) -> None:
    update(completed=done)


def _engine(
    asked: Engine | None,
    quantized: QuantizedModel,
    reference: nn.Module | None,
    out: Path,
    threads: int | None,
    where: torch.device,
    terminal: Terminal,
) -> tuple[str, Any]:
    """The name of the engine, and the engine itself."""
    from torch import nn

    from vitquant.engines import default_engine, engine

    if asked is None:
        name, computed, reason = default_engine(quantized)
        if reason and quantized.arithmetic is not None:  # the recipe asks for integers
            terminal.note(f"simulated, since the model does not lower: {reason}")
    else:
        name, computed = asked.value, engine(asked.value, quantized, out, threads, reference)
    return name, computed.to(where) if isinstance(computed, nn.Module) else computed

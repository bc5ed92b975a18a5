"""`vitquant evaluate`: accuracy of a saved model, beside its float model."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitquant.cli import options
from vitquant.cli.evaluation_data import classes_of, float_model, preprocessing_of
from vitquant.cli.terminal import Terminal
from vitquant.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vitquant.model import QuantizedModel

_BATCH = 50  # the float model runs on it as well

Data = Annotated[Path, typer.Option(metavar="DIR", help="Labelled images: a labels.csv, or one folder per class.")]
Classes = Annotated[
    Path | None,
    typer.Option(
        "--classes",
        metavar="FILE",
        help="Which class a folder is: lines of folder,class_index, or as many names as classes, in their order.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="The float weights: where they are now, if they moved, or pretrained, to fetch them; else as saved.",
    ),
]


class Engine(StrEnum):
    """What computes the logits."""

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
        help="What computes; integer when the model lowers, else simulated, when not given. onnxruntime: the integer "
        "ONNX file, or the QDQ one where there is no other; onnx-integer and onnx-qdq say which.",
    ),
]


def evaluate(
    out: options.Saved,
    data: Data,
    classes: Classes = None,
    batch: options.Batch = _BATCH,
    engine: EngineName = None,
    weights: Weights = None,
    model: options.Repeated = None,
    model_arguments: options.RepeatedArguments = None,
    preprocessing: options.PreprocessingFile = None,
    device: options.DeviceOption = options.Device.AUTO,
    workers: options.Workers = 0,
    skip_bad_images: options.SkipBadImages = False,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Evaluate a quantized model on labelled images, and its float model on the same."""
    with Terminal(json, quiet) as terminal:
        with terminal.progress("loading"):
            import torch

            from vitquant import loading
            from vitquant.engines import file_of
            from vitquant.report.tables import ends_text, facts, result_rows
            from vitquant.tasks import classification
            from vitquant.tasks.images import batches, check_labels, load_listing

            where = options.choose_device(device, threads)
            if classes is None:  # which may name any folder, and counts the model's classes
                load_listing(data)  # what is wrong with it is said before the model is made
            repeated = options.repeated(model, model_arguments)
            quantized = loading.load(out, **repeated).to(where)
            with torch.inference_mode():
                logits = classification.logits_of(quantized(torch.zeros(1, *quantized.input_shape, device=where)))
            if logits.ndim != 2:
                raise ModelError(f"the model's outputs have the shape {tuple(logits.shape)}, not (images, classes)")
            count = logits.shape[-1]
            reference = float_model(out, weights, repeated, terminal)
            items = load_listing(data, classes_of(quantized, reference, count, classes))
            check_labels(items, count)
            steps = preprocessing_of(quantized, preprocessing)
            labelled = batches(items, steps, batch or _BATCH, workers, skip_bad_images)
            if reference is not None:
                reference = reference.to(where)
            name, computed = _engine(engine, quantized, reference, out, threads, where, terminal)
        with terminal.progress("evaluating", len(labelled.items)) as update:
            result = classification.evaluate(
                computed,
                reference,
                labelled,
                count,
                progress=lambda _, done, total: update(completed=done),
                engine=name,
            )
        for note in items.notes:
            terminal.note(note)
        if result.doubt:
            terminal.note(result.doubt)
        if labelled.skipped:
            first = labelled.skipped[0]
            terminal.note(f"{len(labelled.skipped)} images were left out, first: {first.path}: {first.reason}")
        recipe = {"recipe": f"{quantized.recipe.name}, {quantized.bits}", "ends": ends_text(quantized)}
        path = file_of(name, out.absolute())
        file = {} if path is None else {"file": str(path)}
        terminal.result({**asdict(result), "file": file.get("file")}, facts({**result_rows(result), **file, **recipe}))


def _engine(
    asked: Engine | None,
    quantized: QuantizedModel,
    reference: nn.Module | None,
    out: Path,
    threads: int | None,
    where: torch.device,
    terminal: Terminal,
) -> tuple[str, Any]:
    """What computes the logits, and its name."""
    from torch import nn

    from vitquant.engines import default_engine, engine

    if asked is None:
        name, computed, reason = default_engine(quantized)
        if reason and quantized.arithmetic is not None:  # the recipe asks for integers
            terminal.note(f"simulated, since the model does not lower: {reason}")
    elif asked is Engine.FLOAT:
        if reference is None:
            raise ModelError("--engine float: the float model is not there; --weights PATH says where its weights are")
        name, computed = asked.value, reference
    else:
        name, computed = asked.value, engine(asked.value, quantized, out, threads)
    return name, computed.to(where) if isinstance(computed, nn.Module) else computed

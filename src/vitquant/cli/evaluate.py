"""`vitquant evaluate`: accuracy of a saved model, beside its float model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitquant.cli import options
from vitquant.cli.terminal import Terminal
from vitquant.errors import DataError, VitquantError

if TYPE_CHECKING:
    from torch import nn

    from vitquant.model import QuantizedModel
    from vitquant.tasks.preprocessing import Preprocessing

_BATCH = 50  # the float model runs on it as well

Data = Annotated[Path, typer.Option(metavar="DIR", help="Labelled images: a labels.csv, or one folder per class.")]
Weights = Annotated[
    str | None, typer.Option(metavar="PATH", help="Where the float weights are now, if they moved; else as saved.")
]


def evaluate(
    out: options.Saved,
    data: Data,
    batch: options.Batch = _BATCH,
    weights: Weights = None,
    model: options.Repeated = None,
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

            from vitquant import pipeline
            from vitquant.report.tables import ends_text, facts, result_rows
            from vitquant.tasks import classification
            from vitquant.tasks.images import batches, check_labels, load_listing

            where = options.choose_device(device, threads)
            items = load_listing(data)
            quantized = pipeline.load(out, source=model).to(where)
            with torch.inference_mode():
                logits = classification.logits_of(quantized(torch.zeros(1, *quantized.input_shape, device=where)))
            classes = logits.shape[-1]
            check_labels(items, classes)
            labelled = batches(
                items, _preprocessing(quantized, preprocessing), batch or _BATCH, workers, skip_bad_images
            )
            reference = _float_model(out, weights, model, terminal)
            if reference is not None:
                reference = reference.to(where)
        with terminal.progress("evaluating", len(labelled.items)) as update:
            result = classification.evaluate(
                quantized, reference, labelled, classes, progress=lambda done: update(completed=done)
            )
        if labelled.skipped:
            first = labelled.skipped[0]
            terminal.note(f"{len(labelled.skipped)} images were left out, first: {first.path}: {first.reason}")
        recipe = {"recipe": f"{quantized.recipe.name}, {quantized.bits}", "ends": ends_text(quantized)}
        terminal.result(asdict(result), facts({**result_rows(result), **recipe}))


def _preprocessing(quantized: QuantizedModel, file: Path | None) -> Preprocessing:
    """The preprocessing that was saved with the model, with the keys of a file laid over it."""
    from vitquant.tasks.preprocessing import Preprocessing

    saved = quantized.provenance.get("preprocessing")
    if saved is None and file is None:
        raise DataError("the model was saved without its preprocessing; give --preprocessing FILE.toml")
    steps = Preprocessing() if saved is None else Preprocessing.from_dict(saved)
    if file is not None:
        steps = Preprocessing.from_toml(file, steps)
    if steps.input_size != quantized.input_shape:
        given, wanted = list(steps.input_size), list(quantized.input_shape)
        raise DataError(f"{file or 'preprocessing'}: input_size is {given}, the model takes {wanted}; set it so")
    return steps


def _float_model(out: Path, weights: str | None, model: str | None, terminal: Terminal) -> nn.Module | None:
    """The float model; None, with a note, when its weights are not where they were and no others were given."""
    from vitquant.pipeline import float_model

    try:
        return float_model(out, weights, model)
    except VitquantError as error:
        if weights is not None:
            raise
        terminal.note(f"not compared with the float model: {error}; --weights PATH says where they are")
        return None

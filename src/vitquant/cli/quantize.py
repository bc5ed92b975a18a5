"""`vitquant quantize`: a saved quantized model from a model's name and a directory of images."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitquant.cli import calibrating, options
from vitquant.cli.terminal import Terminal

if TYPE_CHECKING:
    from torch import nn

    from vitquant.model import QuantizedModel
    from vitquant.zoo import ModelSource

Output = Annotated[Path, typer.Option(metavar="OUT", help="The directory to write.")]
Simulated = Annotated[
    bool,
    typer.Option("--simulated", help="Write the model even if its recipe promises integers and it cannot be lowered."),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="The task: classification or features; classification where the model gives logits, else "
        "features, when not given.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a saved model that is there.")]
TimeLimit = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="SECONDS",
        callback=options.finite,
        help="Time limit of long methods, which then stop with their current result.",
    ),
]


def quantize(
    model: calibrating.Name,
    calibration: calibrating.Calibration,
    output: Output,
    weights: calibrating.Weights = "pretrained",
    weights_key: calibrating.WeightsKey = None,
    recipe: calibrating.RecipeName = "default",
    bits: calibrating.BitWidths = None,
    settings: calibrating.Settings = None,
    synthesis: calibrating.Synthesis = None,
    images: calibrating.Images = None,
    batch: calibrating.Batch = None,
    preprocessing: options.PreprocessingFile = None,
    model_arguments: calibrating.ModelArguments = None,
    memory_budget: calibrating.MemoryBudget = None,
    time_limit: TimeLimit = None,
    work: calibrating.Work = None,
    workers: options.Workers = "0",
    task: TaskName = None,
    simulated: Simulated = False,
    force: Force = False,
    seed: calibrating.Seed = 0,
    device: options.DeviceOption = options.Device.AUTO,
    image_workers: options.ImageWorkers = 0,
    skip_bad_images: options.SkipBadImages = False,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Quantize MODEL by a recipe and write it to OUT."""
    started = time.perf_counter()
    with Terminal(json, quiet) as terminal:
        with terminal.progress("loading"):
            from vitquant import workflows
            from vitquant.methods.table import planned
            from vitquant.model.checkpoint import SAVED_MODEL, TENSORS
            from vitquant.prepared import Effort, Request, calibration_named, prepare
            from vitquant.recipe import requested
            from vitquant.report.tables import ends_text, facts
            from vitquant.tasks.task import task_named
            from vitquant.workers.opening import asked_workers

            chosen, widths = requested(recipe, bits, settings or ())
            if task is not None:
                task_named(task)  # refuse an unknown task before the model is built
            if memory_budget is not None and not any(step.definition.needs.memory for step in planned(chosen)):
                terminal.note(f"{chosen.name} holds a batch at a time: --memory-budget changes nothing")
            share = asked_workers(workers)
            if share != 0 and not any(step.definition.needs.workers for step in planned(chosen)):
                terminal.note(f"{chosen.name} has no search that other processes can share: --workers changes nothing")
            memory = 4.0 if memory_budget is None else memory_budget
            limit = math.inf if time_limit is None else time_limit
            request = Request(
                model,
                calibration_named(calibration, synthesis or ()),
                weights,
                weights_key,
                images,
                batch,
                preprocessing,
                model_arguments,
                seed,
                image_workers,
                skip_bad_images,
            )
        terminal.continuing(work)
        with terminal.replacing(output, force, SAVED_MODEL) as new:  # refused before long work if it cannot be written
            with terminal.progress("loading") as update:
                prepared = prepare(
                    request,
                    chosen,
                    options.choose_device(device, threads),
                    lambda network, size: workflows.check_quantizable(network, chosen, widths, size, task, simulated),
                    Effort(memory, limit, calibrating.making(update), work),
                )
                network, source, data = prepared.network, prepared.source, prepared.data
            with terminal.progress("capturing, first batch", len(data.items)) as update:
                watched = calibrating.Watched(data, update)
                quantized = workflows.quantize(
                    network,
                    chosen,
                    watched,
                    bits=str(widths),
                    simulated=simulated,
                    source=source,
                    preprocessing=prepared.steps.to_dict(),
                    task=task,
                    seed=seed,
                    progress=watched.step,
                    memory=memory,
                    time_limit=max(0.0, limit - prepared.seconds),
                    work=work,
                    workers=share,
                )
                origin = {"seed": seed, "batch": prepared.batch}
                quantized.provenance["calibration"] |= prepared.origin | origin
                update(description="writing")
                quantized.save(new)
                size = (new / TENSORS).stat().st_size
        calibrating.say_what_was_used(terminal, prepared, request, chosen)
        values = _facts(quantized, network, source, output, size)
        seconds = time.perf_counter() - started
        rows = {
            "model": source.name,
            "task": str(values["task"]),
            "recipe": f"{chosen.name}, {widths}",
            "calibrated on": f"{quantized.provenance['calibration']['images']} images of {request.calibration}, "
            f"{prepared.batch} in a batch",
            "quantized": f"{values['quantized_values']} of {values['values']} tensors that operations read",
            "ends": ends_text(quantized),
            "size": f"{values['bytes'] / 1e6:.1f} MB, float {values['float_bytes'] / 1e6:.1f} MB",
            "written to": f"{output}, after {seconds:.1f} s",
        }
        terminal.result({**values, "skipped_images": len(data.skipped), "seconds": seconds}, facts(rows))


def _facts(
    quantized: QuantizedModel, network: nn.Module, source: ModelSource, output: Path, size: int
) -> dict[str, Any]:
    """Facts about the quantized model and its origin, as plain values."""
    return {
        "output": str(output.absolute()),
        "model": source.name,
        "recipe": quantized.recipe.name,
        "bits": str(quantized.bits),
        "task": quantized.provenance["task"],
        "calibration": quantized.provenance["calibration"],
        "values": len(quantized.values),
        "quantized_values": len(quantized.quantized_names),
        "bytes": size,
        "float_bytes": sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()),
    }

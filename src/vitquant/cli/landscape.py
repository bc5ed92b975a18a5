"""`vitquant landscape`: the loss of a quantized model along lines through the scales of one block."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitquant.cli import calibrating, options
from vitquant.cli.terminal import Terminal
from vitquant.files import Directory, write_file

if TYPE_CHECKING:
    from torch import nn

NUMBERS, FIGURE = "landscape.json", "landscape.png"
LANDSCAPE = Directory("landscape", {NUMBERS: None, FIGURE: None}, lambda directory: (directory / NUMBERS).is_file())
Output = Annotated[Path | None, typer.Option(metavar="DIR", help=f"A directory to write: {NUMBERS} and {FIGURE}.")]
Images = Annotated[int, typer.Option(min=1, help="Number of images to calibrate on, and by whose loss is searched.")]
HeldOut = Annotated[int, typer.Option(min=1, help="Number of other images, by which nothing is chosen.")]
Block = Annotated[
    int | None, typer.Option(min=0, help="Number of the block, from 0; the last with such scales when not given.")
]
Reach = Annotated[
    float,
    typer.Option(callback=options.finite, help="How far a scale moves along a random line, as a share of it; below 1."),
]
Points = Annotated[int, typer.Option(help="Points on each line, 3 or more.")]
Directions = Annotated[int, typer.Option(help="Number of random lines.")]
Cycles = Annotated[int, typer.Option(help="Children of the search; 0 leaves out the search and its line.")]
Loss = Annotated[str | None, typer.Option(help="infonce, mse, cosine or kl; the recipe's when not given.")]
Simulated = Annotated[bool, typer.Option("--simulated", help="Measure the simulation alone: several times as fast.")]


def landscape(
    model: calibrating.Name,
    calibration: calibrating.Calibration,
    output: Output = None,
    weights: calibrating.Weights = "pretrained",
    weights_key: calibrating.WeightsKey = None,
    recipe: calibrating.RecipeName = "evol-q",
    bits: calibrating.BitWidths = None,
    settings: calibrating.Settings = None,
    synthesis: calibrating.Synthesis = None,
    block: Block = None,
    reach: Reach = 0.05,
    points: Points = 41,
    directions: Directions = 2,
    cycles: Cycles = 60,
    loss: Loss = None,
    simulated: Simulated = False,
    images: Images = 64,
    held_out: HeldOut = 64,
    batch: calibrating.Batch = None,
    preprocessing: options.PreprocessingFile = None,
    model_arguments: calibrating.ModelArguments = None,
    memory_budget: calibrating.MemoryBudget = None,
    force: Annotated[bool, typer.Option("--force", help="Replace those that are there.")] = False,
    work: calibrating.Work = None,
    seed: calibrating.Seed = 0,
    device: options.DeviceOption = options.Device.AUTO,
    image_workers: options.ImageWorkers = 0,
    skip_bad_images: options.SkipBadImages = False,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Quantize MODEL, and show its loss along random and searched lines through the scales of one block."""
    started = time.perf_counter()
    with Terminal(json, quiet) as terminal:
        with terminal.progress("loading"):
            import vitquant
            from vitquant.loss_landscape.landscape import check_numbers
            from vitquant.prepared import Effort, Request, calibration_named, prepare
            from vitquant.recipe import requested
            from vitquant.report.figures import check_matplotlib, landscape_figure
            from vitquant.report.tables import facts, landscape_facts, landscape_table
            from vitquant.workflows import check_quantizable

            memory = 4.0 if memory_budget is None else memory_budget
            check_numbers(reach, points, directions, cycles, loss, memory)
            if output is not None:
                check_matplotlib()
            chosen, base = requested(recipe, bits, settings or ())
            source = calibration_named(calibration, synthesis or ())
            request = Request(
                model, source, weights, weights_key, images, batch, preprocessing, model_arguments, seed,
                image_workers, skip_bad_images, held_out,
            )  # fmt: skip
        terminal.continuing(work)
        with nullcontext() if output is None else terminal.replacing(output, force, LANDSCAPE) as new:
            with terminal.progress("loading") as update:
                where = options.choose_device(device, threads)
                effort = Effort(memory, progress=calibrating.making(update), work=work)

                def check(network: nn.Module, size: tuple[int, int, int]) -> None:
                    check_quantizable(network, chosen, base, size, simulated=True)

                prepared = prepare(request, chosen, where, check, effort)
            assert prepared.held_out is not None
            with terminal.progress("capturing, first batch", len(prepared.data.items)) as update:
                watched = calibrating.Watched(prepared.data, update)
                found = vitquant.landscape(
                    prepared.network,
                    chosen,
                    watched,
                    prepared.held_out,
                    bits=str(base),
                    block=block,
                    reach=reach,
                    points=points,
                    directions=directions,
                    cycles=cycles,
                    loss=loss,
                    simulated=simulated,
                    seed=seed,
                    progress=watched.step,
                    memory=memory,
                    work=work,
                )
                about = {"model": prepared.source.name, **prepared.origin}
                found = replace(found, about=about | found.about)
            if new is not None:
                write_file(new / NUMBERS, found.to_json().encode())
                write_file(new / FIGURE, landscape_figure(found))
        calibrating.say_what_was_used(terminal, prepared, request, chosen)
        counts = [found.about[name]["images"] for name in ("calibration", "held_out")]
        rows = {
            "model": prepared.source.name,
            "recipe": f"{chosen.name}, {base}",
            **landscape_facts(found),
            "images": f"{counts[0]} of {source}, {counts[1]} others held out",
            "after": f"{time.perf_counter() - started:.1f} s",
        }
        if output is not None:
            rows["written to"] = f"{output / NUMBERS}, {output / FIGURE}"
        skipped = len(prepared.data.skipped) + len(prepared.held_out.skipped)
        values = {
            **found.to_dict(),
            "skipped_images": skipped,
            "output": None if output is None else str(output.absolute()),
        }
        terminal.result(values, landscape_table(found), facts(rows))

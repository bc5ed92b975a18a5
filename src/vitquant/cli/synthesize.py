"""`vitquant synthesize`: images to calibrate on, made from a model alone."""

from __future__ import annotations

import math
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from vitquant.cli import calibrating, options
from vitquant.cli.terminal import Terminal
from vitquant.files import write_file

Count = Annotated[int, typer.Option(help="Number of images.")]
Output = Annotated[Path, typer.Option(metavar="DIR", help="The directory to write, for --calibration.")]


def synthesize(
    model: calibrating.Name,
    output: Output,
    count: Count = 32,
    method: Annotated[
        str,
        typer.Option(
            help="psaq-vit-leaves; psaq-vit, as published; or the baselines gaussian-noise, uniform-noise, dead-leaves."
        ),
    ] = "psaq-vit-leaves",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method, as in iterations=100; repeat."),
    ] = None,
    weights: calibrating.Weights = "pretrained",
    weights_key: calibrating.WeightsKey = None,
    preprocessing: options.PreprocessingFile = None,
    model_arguments: calibrating.ModelArguments = None,
    memory_budget: Annotated[
        float | None,
        typer.Option(min=0, metavar="GB", callback=options.finite, help="Memory for gradients; 4 when not given."),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="SECONDS", callback=options.finite, help="After which the images so far are written."
        ),
    ] = None,
    work: calibrating.Work = None,
    force: Annotated[bool, typer.Option("--force", help="Replace synthetic images that are there.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=options.LARGEST_SEED, help="Seed of all random draws.")] = 0,
    device: options.DeviceOption = options.Device.AUTO,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Make images for MODEL from the model alone, and write them to DIR.

    Under torchrun --nproc-per-node 2 --no-python vitquant synthesize ... each process makes a part of them.
    """
    started = time.perf_counter()
    with Terminal(json, quiet) as terminal, ExitStack() as held:
        with terminal.progress("loading"):
            import vitquant
            from vitquant.prepared import built, named_source
            from vitquant.report.figures import check_matplotlib, contact_sheet
            from vitquant.report.tables import facts
            from vitquant.synthetic_images import SynthesisStoppedError, check_synthesis, synthetic_directory
            from vitquant.tasks.decoding import readable_endings
            from vitquant.tasks.folders import CONTACT_SHEET
            from vitquant.workers.ranks import process_group

            check_synthesis(count, method, settings or ())
            check_matplotlib()
            readable_endings()  # refuse a missing Pillow before long work
            named = named_source(model, weights, weights_key, model_arguments, seed)
            ranks = held.enter_context(process_group())
        terminal.continuing(work)
        new = held.enter_context(terminal.replacing(output, force, synthetic_directory())) if ranks.rank == 0 else None
        with terminal.progress("loading"):
            found = built(named, preprocessing, options.choose_device(device, threads))
        stopped: SynthesisStoppedError | None = None
        with terminal.progress("capturing") as update:
            try:
                images = vitquant.synthesize(
                    found.network,
                    count,
                    method,
                    settings=settings or (),
                    preprocessing=found.steps.to_dict(),
                    seed=seed,
                    progress=calibrating.making(update),
                    memory=4.0 if memory_budget is None else memory_budget,
                    time_limit=math.inf if time_limit is None else time_limit,
                    work=work,
                    ranks=ranks,
                )
            except SynthesisStoppedError as error:
                stopped, images = error, error.images
            if new is None:
                return
            update(description="writing")
            images = replace(images, about=images.about | {"model": found.source.to_dict()})
            images.write_into(new)
            write_file(new / CONTACT_SHEET, contact_sheet(images))
        held.close()
        for note in found.notes:
            terminal.note(note)
        if stopped is not None:
            raise SynthesisStoppedError(f"{stopped}; {output} holds the images of the iteration before", images)
        if images.cut_short:
            terminal.note(f"the time limit came first: {images.cut_short}")
        ends = images.ends_of_losses
        seconds = time.perf_counter() - started
        rows = {
            "model": found.source.name,
            "images": f"{len(images)} of {'x'.join(map(str, images.pixels.shape[1:]))} by {method}, seed {seed}",
            **{name: f"{begun:.4g} at first, {last:.4g} at last" for name, (begun, last) in ends.items()},
            "written to": f"{output}, after {seconds:.1f} s",
        }
        values = {**images.about, "losses": ends, "images": len(images), "output": str(output.absolute())}
        terminal.result({**values, "seconds": seconds}, facts(rows))

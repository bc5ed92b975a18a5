"""`vitquant sensitivity`: the sensitivity of each part of a model, quantized by itself."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitquant.cli import calibrating, options
from vitquant.cli.terminal import Terminal
from vitquant.errors import AllocationError
from vitquant.files import Directory, write_file

if TYPE_CHECKING:
    from torch import nn

TABLE, FIGURE = "sensitivity.json", "sensitivity.png"
SENSITIVITY = Directory("sensitivity", {TABLE: None, FIGURE: None}, lambda directory: (directory / TABLE).is_file())
Output = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help=f"A directory to write: {TABLE}, for `vitquant allocate`, and {FIGURE}."),
]
Candidates = Annotated[str, typer.Option(metavar="BITS", help="Bit widths of attention and MLP, as in 4,5,6,7,8.")]


def sensitivity(
    model: calibrating.Name,
    calibration: calibrating.Calibration,
    output: Output = None,
    weights: calibrating.Weights = "pretrained",
    weights_key: calibrating.WeightsKey = None,
    recipe: calibrating.RecipeName = "vt-ptq",
    bits: calibrating.BitWidths = None,
    candidates: Candidates = "4,5,6,7,8",
    settings: calibrating.Settings = None,
    synthesis: calibrating.Synthesis = None,
    images: calibrating.Images = None,
    batch: calibrating.Batch = None,
    preprocessing: options.PreprocessingFile = None,
    model_arguments: calibrating.ModelArguments = None,
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
    """Quantize each module and each site of MODEL by itself, and show what that does to the outputs."""
    started = time.perf_counter()
    with Terminal(json, quiet) as terminal:
        with terminal.progress("loading"):
            import vitquant
            from vitquant.allocation.sensitivity import check_candidates
            from vitquant.prepared import Effort, Request, calibration_named, prepare
            from vitquant.recipe import requested
            from vitquant.report.figures import check_matplotlib, sensitivity_figure
            from vitquant.report.tables import facts, sensitivity_table
            from vitquant.workflows import check_quantizable

            widths = check_candidates(_widths(candidates))
            if output is not None:
                check_matplotlib()
            chosen, base = requested(recipe, bits, settings or ())
            source = calibration_named(calibration, synthesis or ())
            request = Request(
                model, source, weights, weights_key, images, batch, preprocessing, model_arguments, seed,
                image_workers, skip_bad_images,
            )  # fmt: skip
        terminal.continuing(work)
        with nullcontext() if output is None else terminal.replacing(output, force, SENSITIVITY) as new:
            with terminal.progress("loading") as update:
                where = options.choose_device(device, threads)
                effort = Effort(progress=calibrating.making(update), work=work)

                def check(network: nn.Module, size: tuple[int, int, int]) -> None:
                    check_quantizable(network, chosen, base, size, simulated=True)

                prepared = prepare(request, chosen, where, check, effort)
            with terminal.progress("capturing, first batch", len(prepared.data.items)) as update:
                watched = calibrating.Watched(prepared.data, update)
                table = vitquant.sensitivity(
                    prepared.network,
                    chosen,
                    watched,
                    bits=str(base),
                    candidates=widths,
                    progress=watched.step,
                    work=work,
                )
                about = {"model": prepared.source.name, **prepared.origin, "seed": seed}
                table = replace(table, about=table.about | about)
            if new is not None:
                write_file(new / TABLE, table.to_json().encode())
                write_file(new / FIGURE, sensitivity_figure(table.modules, table.sites))
        calibrating.say_what_was_used(terminal, prepared, request, chosen)
        rows = {
            "model": prepared.source.name,
            "recipe": f"{chosen.name}, {table.bits}; modules at {', '.join(map(str, table.candidates))} bits",
            "measured on": f"{table.about['calibration']['images']} images of {source}",
            "after": f"{time.perf_counter() - started:.1f} s",
        }
        if output is not None:
            rows["written to"] = f"{output / TABLE}, {output / FIGURE}"
        values = {
            **table.about,
            "recipe": chosen.name,
            "bits": table.bits,
            "skipped_images": len(prepared.data.skipped),
            "output": None if output is None else str(output.absolute()),
            "modules": [each.to_dict() for each in table.modules],
            "sites": [each.to_dict() for each in table.sites],
        }
        by_name = sorted(table.modules, key=lambda each: list(table.numbers).index(each.name))
        terminal.result(values, sensitivity_table(by_name), sensitivity_table(table.sites), facts(rows))


def _widths(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise AllocationError(f"--candidates {text!r}: give bit widths with commas between, as in 4,5,6,7,8") from None

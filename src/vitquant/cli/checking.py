"""Shared by `export` and `parity`: the images for the comparison, and the output of its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitquant.cli.float_model import float_model
from vitquant.cli.terminal import Terminal

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import Tensor, nn

    from vitquant.model import QuantizedModel
    from vitquant.parity import Form, ParityReport
    from vitquant.progress import Progress

BROKEN = 1  # the exit code

Images = Annotated[
    int,
    typer.Option(
        min=1,
        help="How many images the forms are compared on; they are held in memory. Every site is compared on the first "
        "8 of them, the int64 definition on 4.",
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Images to compare on; those that it was calibrated on when not given."),
]


def compare_forms(
    terminal: Terminal,
    out: Path,
    quantized: QuantizedModel,
    forms: Sequence[Form],
    data: Path | None,
    images: int,
    preprocessing: Path | None,
    weights: str | None,
    repeated: dict[str, Any],
) -> ParityReport:
    """Run all forms of a model on the same images, including the float model if its weights are available."""
    import vitquant

    exact = all(form.exact for form in forms)
    tensors, reference = compared_on(terminal, out, quantized, exact, data, images, preprocessing, weights, repeated)
    with terminal.progress("comparing") as update:
        return vitquant.compare(quantized, tensors, forms, float_model=reference, progress=shown_by(update))


def shown_by(update: Callable[..., None]) -> Progress:
    """The progress callback of a comparison for a progress bar."""

    def show(what: str, done: int, total: int) -> None:
        update(description=f"comparing: {what}", completed=done, total=total, unit="")

    return show


def compared_on(
    terminal: Terminal,
    out: Path,
    quantized: QuantizedModel,
    exact: bool,
    data: Path | None,
    images: int,
    preprocessing: Path | None,
    weights: str | None,
    repeated: dict[str, Any],
) -> tuple[list[Tensor], nn.Module | None]:
    """The images for the comparison, and the float model if its weights are available.

    Arguments:
        exact: whether all forms must equal the integer program bit for bit, for which the float model is not needed.
    """
    from vitquant.image_folders import comparison_images, preprocessing_for
    from vitquant.parity import ALONE

    steps = preprocessing_for(quantized, preprocessing)
    tensors = comparison_images(quantized, data, images, steps)
    reference = float_model(out, weights, repeated, terminal)
    if reference is None and not exact:
        terminal.note(f"without it QDQ and OpenVINO promise no more than a cosine of {ALONE} with the simulation")
    return tensors, reference


def shown(report: ParityReport) -> tuple[dict[str, Any], list[RenderableType]]:
    """A report as plain values, and as tables."""
    from vitquant.report.parity import as_dict, comparisons_table, flips_table, verdict

    tables: list[RenderableType] = [comparisons_table(report.comparisons)]
    if report.flips:
        tables.append(flips_table(report.flips))
    return as_dict(report), [*tables, verdict(report)]


def end(terminal: Terminal, report: ParityReport) -> None:
    """End the command with exit code 1 if a criterion is not met."""
    if report.broken:
        terminal.failure(f"broken: {'; '.join(report.broken)}")
        raise typer.Exit(BROKEN)

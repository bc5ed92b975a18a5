"""Shared by the commands that quantize: options of the model and its images, notes about them, and progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitquant.cli import options
from vitquant.cli.completing import recipe_names
from vitquant.cli.terminal import Terminal

if TYPE_CHECKING:
    from torch import Tensor

    from vitquant.prepared import Prepared, Request
    from vitquant.recipe import Recipe
    from vitquant.tasks.images import ImageBatches

Name = Annotated[
    str, typer.Argument(help="timm:NAME, transformers:NAME, torchvision:NAME or python:package.module:factory.")
]
Weights = Annotated[
    str, typer.Option(metavar="PATH|pretrained|random", help="A weights file, or pretrained or random weights.")
]
WeightsKey = Annotated[
    str | None,
    typer.Option(
        "--weights-key", metavar="KEY", help="Which of several state dicts in the file: model, state_dict_ema, ..."
    ),
]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        help="A recipe's name or TOML file; + lays overlays over it. default: the best in integers at these bits.",
        autocompletion=recipe_names,
    ),
]
BitWidths = Annotated[str | None, typer.Option("--bits", help="Replaces the recipe's, as in w8a8 or w4a8s4.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="RULE.KEY=VALUE", help="Replaces one key of the recipe; repeat.")
]
Calibration = Annotated[
    str,
    typer.Option(
        metavar="DIR|synthetic",
        help="Images to calibrate on; labels are not read. synthetic, or synthetic:METHOD: images made for the model, "
        "see vitquant synthesize.",
    ),
]
Synthesis = Annotated[
    list[str] | None,
    typer.Option("--synthesis", metavar="KEY=VALUE", help="A setting of how images are made; repeat."),
]
Images = Annotated[
    int | None, typer.Option(min=1, help="Number of calibration images; the recipe's number when not given.")
]
Batch = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=options.LARGEST_BATCH,
        help="Images in a batch; the recipe's number, or all images where those are fewer, when not given.",
    ),
]
ModelArguments = Annotated[
    list[str] | None, typer.Option("--model-arg", metavar="KEY=VALUE", help="An argument of the model; repeat.")
]
Work = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Directory for saved state; the same command continues there after an interruption."
    ),
]
MemoryBudget = Annotated[
    float | None,
    typer.Option(
        min=0, metavar="GB", callback=options.finite, help="Memory for searches beside the model; 4 when not given."
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, max=options.LARGEST_SEED, help="Seed of random weights and of the choice of images.")
]


def say_what_was_used(terminal: Terminal, prepared: Prepared, request: Request, recipe: Recipe) -> None:
    """Print notes about weights and images: also if there are fewer than the recipe asks for, or some were skipped."""
    for note in prepared.notes:
        terminal.note(note)
    others = [] if prepared.held_out is None else prepared.held_out.skipped
    usual, skipped = recipe.calibration.images, [*prepared.data.skipped, *others]
    if request.images is None and prepared.chosen < usual:
        made = "directory" not in prepared.origin
        there = (
            f"{prepared.chosen} images were made" if made else f"all {prepared.chosen} images of {request.calibration}"
        )
        terminal.note(f"{there}{'' if made else ' were used'}; {recipe.name} asks for {usual}")
    if skipped:
        terminal.note(f"{len(skipped)} images were left out, first: {skipped[0].path}: {skipped[0].reason}")


def making(update: Callable[..., None]) -> Callable[[str, int, int], None]:
    """A progress callback for images that are made.

    Arguments:
        update: the update function of a progress bar.
    """
    return lambda what, done, total: update(description=what, completed=done, total=total, unit="iterations")


class Watched:
    """Calibration batches that report progress whenever they are iterated over; capturing comes after the first batch.

    Arguments:
        batches: the images.
        update: the update function of a progress bar.
    """

    def __init__(self, batches: ImageBatches, update: Callable[..., None]) -> None:
        self._batches, self._update = batches, update
        self._passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._passes += 1
        done, what = 0, "calibrating" if self._passes == 1 else f"pass {self._passes} over the images"
        for images, labels in self._batches:
            yield images, labels
            done += len(images)
            self._update(description=what, completed=done, total=len(self._batches.items), unit="images")
        self._update(description="choosing scales")

    def step(self, what: str, done: int, total: int) -> None:
        """Report the progress of work that is not counted in images."""
        self._update(description=what, completed=done, total=total, unit="")

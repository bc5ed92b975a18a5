"""Options shared by several commands."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitquant.errors import VitquantError
from vitquant.exports.sizes import LARGEST_BATCH

if TYPE_CHECKING:
    import torch


class Device(StrEnum):
    """Where to compute; `auto` is CUDA when there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


LARGEST_SEED = 2**64 - 1  # torch's maximum


def finite(value: float | None) -> float | None:
    """Refuse NaN and infinity.

    Raises:
        typer.BadParameter: the value is one of them.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number.")
    return value


Saved = Annotated[Path, typer.Argument(metavar="OUT", help="Directory of a saved model.")]
Repeated = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="NAME", help="Repeat the model's name if loading it imports code, reads files or downloads."
    ),
]
RepeatedArguments = Annotated[
    list[str] | None,
    typer.Option("--model-arg", metavar="KEY=VALUE", help="Repeat an argument of the model that may load something."),
]
Batch = Annotated[int | None, typer.Option(min=1, max=LARGEST_BATCH, help="Images in a batch.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where to compute; auto: CUDA when there is one.")]
ImageWorkers = Annotated[
    int, typer.Option("--image-workers", min=0, max=256, help="Processes that decode images; 0: this one.")
]
Workers = Annotated[
    str,
    typer.Option(
        metavar="N|ray", help="Processes that share a search, or ray: those of a Ray cluster; 0: this one alone."
    ),
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Threads that compute; torch's choice when not given.")
]
SkipBadImages = Annotated[bool, typer.Option("--skip-bad-images", help="Leave out images that cannot be read.")]
PreprocessingFile = Annotated[
    Path | None,
    typer.Option(
        "--preprocessing",
        metavar="FILE.toml",
        help="Replaces the model's own: input_size, interpolation, crop_pct, mean, std, exif_orientation; absent keys "
        "stay.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no notes, no tables: errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' warnings.")]


def repeated(model: str | None, arguments: list[str] | None) -> dict[str, Any]:
    """The parts of a saved model's source that the caller repeats, as arguments for `loading.load`."""
    from vitquant.zoo import parse_model_arguments

    return {"source": model, "arguments": parse_model_arguments(arguments or ())}


def choose_device(device: Device, threads: int | None) -> torch.device:
    """The device to compute on, with the number of threads set.

    Raises:
        VitquantError: CUDA is asked for and not available.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if device is Device.CUDA and not torch.cuda.is_available():
        raise VitquantError("--device cuda: torch finds no CUDA device here; give --device cpu")
    if device is Device.AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)

"""`vitquant quantize`: from a name and a directory of images to a saved model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitquant.cli import options
from vitquant.cli.terminal import Terminal
from vitquant.errors import DataError, ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vitquant.model import QuantizedModel
    from vitquant.tasks.images import Item
    from vitquant.tasks.preprocessing import Preprocessing
    from vitquant.zoo import ModelSource

Name = Annotated[
    str, typer.Argument(help="timm:NAME, transformers:NAME, torchvision:NAME or python:package.module:factory.")
]
Weights = Annotated[str, typer.Option(metavar="PATH|pretrained|random", help="A state dict, or where from.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="A recipe's name or TOML file; + lays overlays over it.")]
BitWidths = Annotated[str | None, typer.Option("--bits", help="Replaces the recipe's, as in w8a8 or w4a8s4.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="RULE.KEY=VALUE", help="Replaces one key of the recipe; repeat.")
]
CalibrationFolder = Annotated[Path, typer.Option(metavar="DIR", help="Images to calibrate on; labels are not read.")]
Images = Annotated[int | None, typer.Option(min=1, help="How many of them; the recipe's number when not given.")]
Batch = Annotated[
    int | None,
    typer.Option(
        min=1, help="Images in a batch; the recipe's number, or all images where those are fewer, when not given."
    ),
]
ModelArguments = Annotated[
    list[str] | None, typer.Option("--model-arg", metavar="KEY=VALUE", help="An argument of the model; repeat.")
]
Output = Annotated[Path, typer.Option(metavar="OUT", help="The directory to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a saved model that is there.")]
Seed = Annotated[int, typer.Option(help="Of random weights and of the choice of images.")]


def quantize(
    model: Name,
    calibration: CalibrationFolder,
    output: Output,
    weights: Weights = "pretrained",
    recipe: RecipeName = "minmax",
    bits: BitWidths = None,
    settings: Settings = None,
    images: Images = None,
    batch: Batch = None,
    preprocessing: options.PreprocessingFile = None,
    model_arguments: ModelArguments = None,
    force: Force = False,
    seed: Seed = 0,
    device: options.DeviceOption = options.Device.AUTO,
    workers: options.Workers = 0,
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
            import torch

            from vitquant import pipeline
            from vitquant.checkpoint import check_target
            from vitquant.recipe import Bits, load_recipe, override
            from vitquant.report.tables import ends_text, facts
            from vitquant.tasks.images import batches, load_listing
            from vitquant.zoo import ModelSource, check_name, create, parse_model_arguments, pinned

            # What is wrong is said before what takes long.
            check_target(output, force)
            chosen = override(load_recipe(recipe), settings or ())
            widths = str(chosen.bits if bits is None else Bits.parse(bits))
            where = options.choose_device(device, threads)
            torch.manual_seed(seed)
            if weights not in ("pretrained", "random"):
                weights = str(Path(weights).absolute())  # it is saved, and `evaluate` may run elsewhere
            named = ModelSource(model, parse_model_arguments(model_arguments or ()), weights, seed)
            check_name(named)
            items = _choose(load_listing(calibration), calibration, images, chosen.calibration.images, seed)
            size = batch or min(chosen.calibration.batch, len(items))
            _refuse_less_than_a_batch(len(items), batch, calibration)
            source = pinned(named)
            network = create(source).to(where)
            steps = _preprocessing(network, source, preprocessing)
            data = batches(items, steps, size, workers, skip_bad_images)
            _refuse_less_than_a_batch(len(data.items), batch, calibration)
        with terminal.progress("capturing, first batch", len(data.items)) as update:
            stream = _Watched(data, update)
            quantized = pipeline.quantize(
                network, chosen, stream, bits=widths, source=source, preprocessing=steps.to_dict()
            )
            origin = {"directory": str(calibration.absolute()), "seed": seed, "batch": size}
            quantized.provenance["calibration"] |= origin
            update(description="writing")
            quantized.save(output, force)
        if images is None and len(items) < (usual := chosen.calibration.images):
            terminal.note(f"all {len(items)} images of {calibration} were used; {chosen.name} asks for {usual}")
        if data.skipped:
            first = data.skipped[0]
            terminal.note(f"{len(data.skipped)} images were left out, first: {first.path}: {first.reason}")
        values = _facts(quantized, network, source, output)
        seconds = time.perf_counter() - started
        rows = {
            "model": source.name,
            "recipe": f"{chosen.name}, {widths}",
            "calibrated on": f"{values['calibration']['images']} images of {calibration}, {size} in a batch",
            "quantized": f"{values['quantized_values']} of {values['values']} tensors that operations read",
            "ends": ends_text(quantized),
            "size": f"{values['bytes'] / 1e6:.1f} MB, float {values['float_bytes'] / 1e6:.1f} MB",
            "written to": f"{output}, after {seconds:.1f} s",
        }
        terminal.result({**values, "skipped_images": len(data.skipped), "seconds": seconds}, facts(rows))


def _facts(quantized: QuantizedModel, network: nn.Module, source: ModelSource, output: Path) -> dict[str, Any]:
    """What was made of what, as plain values."""
    from vitquant.checkpoint import TENSORS

    return {
        "output": str(output.absolute()),
        "model": source.name,
        "recipe": quantized.recipe.name,
        "bits": str(quantized.bits),
        "calibration": quantized.provenance["calibration"],
        "values": len(quantized.values),
        "quantized_values": len(quantized.quantized_names),
        "bytes": (output / TENSORS).stat().st_size,
        "float_bytes": sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()),
    }


def _choose(items: list[Item], directory: Path, asked: int | None, usual: int, seed: int) -> list[Item]:
    """The images to calibrate on: as many as asked for, or else the recipe's number or all there are."""
    from vitquant.tasks.images import subset

    if asked is not None and asked > len(items):
        raise DataError(
            f"{directory}: {asked} images asked for, {len(items)} there; give --images {len(items)} or less"
        )
    return subset(items, asked or min(usual, len(items)), seed)


def _refuse_less_than_a_batch(count: int, asked: int | None, directory: Path) -> None:
    if asked is not None and count < asked:
        raise DataError(
            f"{directory}: {count} calibration images are less than a batch of {asked}; give more, or --batch {count}"
        )


def _preprocessing(network: nn.Module, source: ModelSource, file: Path | None) -> Preprocessing:
    """The model's own preprocessing, with the keys of a file laid over it."""
    from vitquant.tasks.preprocessing import Preprocessing
    from vitquant.zoo import preprocessing_of

    if file is None:
        return preprocessing_of(network, source)
    try:
        own = preprocessing_of(network, source)
    except ModelError:  # it says to give a file, and here is one
        own = None
    return Preprocessing.from_toml(file, own)


class _Watched:
    """Calibration batches with progress, every time they are gone through; capture follows the very first."""

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]], update: Callable[..., None]) -> None:
        self._batches, self._update = batches, update
        self._passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._passes += 1
        done, what = 0, "calibrating" if self._passes == 1 else f"pass {self._passes} over the images"
        for images, labels in self._batches:
            yield images, labels
            done += len(images)
            self._update(description=what, completed=done)
        self._update(description="choosing scales")

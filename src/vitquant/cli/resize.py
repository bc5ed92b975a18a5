"""`vitquant resize`: a saved model for images of another size, with the scales that it has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from vitquant.cli import options
from vitquant.cli.terminal import Terminal
from vitquant.errors import CheckpointError

Size = Annotated[str, typer.Option("--image-size", metavar="N|HxW", help="Of the images, in pixels: 256 or 256x192.")]
Output = Annotated[Path, typer.Option(metavar="OUT", help="The directory to write.")]
Arguments = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        metavar="KEY=VALUE",
        help="An argument with which the model takes that size, such as dynamic_img_size=True; or one to repeat.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a saved model that is there.")]


def resize(
    out: options.Saved,
    image_size: Size,
    output: Output,
    model: options.Repeated = None,
    model_arguments: Arguments = None,
    force: Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write a quantized model for images of another size: nothing is calibrated, weights and scales stay.

    `evaluate` says what that is worth.
    """
    with Terminal(json, quiet) as terminal:
        with terminal.progress("loading"):
            from vitquant import loading
            from vitquant.image_size import at_image_size
            from vitquant.model.checkpoint import SAVED_MODEL, read_config
            from vitquant.model.config import check_config
            from vitquant.report.tables import facts
            from vitquant.zoo import ModelSource, architecture

            size = _size(image_size)
            said = check_config(read_config(out), out).get("source")
            if not said:
                raise CheckpointError(f"{out} was saved without the model's source; in Python, vitquant.at_image_size")
            source = ModelSource.from_dict(said)
            given = options.repeated(model, model_arguments)["arguments"]
            repeated = {key: value for key, value in given.items() if source.arguments.get(key) == value}
        with terminal.replacing(output, force, SAVED_MODEL) as new:
            with terminal.progress("loading"):
                quantized = loading.load(out, source=model, arguments=repeated)
                free = ModelSource.from_dict({**said, "arguments": {**source.arguments, **given}})
                network = architecture(free)
            with terminal.progress("capturing"):
                resized = at_image_size(quantized, network, size, free)
                resized.save(new)
        before, after = (" x ".join(map(str, each.input_shape)) for each in (quantized, resized))
        rows = {"model": source.name, "images": f"{after}, before {before}", "written to": str(output)}
        values = {"model": source.name, "input_shape": list(resized.input_shape), "output": str(output.absolute())}
        terminal.result(values, facts(rows))


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text, re.ASCII)
    if found is None:
        raise typer.BadParameter(f"{text!r}: give a number of pixels, or height and width as in 256x192")
    return int(found[1]), int(found[2] or found[1])

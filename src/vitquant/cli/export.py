"""`vitquant export`: a saved model exported to the format of a runtime, and compared with the export."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vitquant.cli import options
from vitquant.cli.checking import Data, Images, compared_on, end, shown, shown_by
from vitquant.cli.evaluate import Weights
from vitquant.cli.terminal import Terminal


class Format(StrEnum):
    """The names of the export formats."""

    PROGRAM = "program"
    ONNX_INTEGER = "onnx-integer"
    ONNX_QDQ = "onnx-qdq"
    OPENVINO = "openvino"


Formats = Annotated[
    Format,
    typer.Option(
        "--format",
        help="program: the integer program. onnx-integer: the integer program in ONNX. onnx-qdq: the simulation in "
        "ONNX. openvino: the simulation as OpenVINO's files.",
    ),
]
Output = Annotated[
    Path | None, typer.Option(metavar="PATH", help="What to write; a file or directory in OUT when not given.")
]
FloatEnds = Annotated[
    bool, typer.Option("--float-io", help="onnx-integer: float images in, floats out, instead of codes.")
]
FixedBatch = Annotated[
    int | None,
    typer.Option(
        "--batch",
        min=1,
        max=options.LARGEST_BATCH,
        help="Fixed batch size of the file; any batch when not given.",
    ),
]
Opset = Annotated[
    int | None, typer.Option("--opset", help="Version of ONNX's operators, 18 to 25; 20 or 21 when not given.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def export(
    out: options.Saved,
    format: Formats,
    output: Output = None,
    float_io: FloatEnds = False,
    batch: FixedBatch = None,
    opset: Opset = None,
    force: Force = False,
    data: Data = None,
    images: Images = 16,
    weights: Weights = None,
    model: options.Repeated = None,
    model_arguments: options.RepeatedArguments = None,
    preprocessing: options.PreprocessingFile = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Export a quantized model to the format of a runtime, after the export was run and compared with the model.

    Exit code 1, and nothing is written, when a promise is broken.
    """
    with Terminal(json, quiet) as terminal:
        with terminal.progress("loading"):
            from vitquant.exports.formats import FORMATS, check_options, kind_of
            from vitquant.loading import load
            from vitquant.report.tables import facts
            from vitquant.workflows import write_compared

            check_options(format, float_io, batch, opset)
            path = (out / FORMATS[format].path if output is None else output).absolute()
            repeated = options.repeated(model, model_arguments)
        with terminal.replacing(path, force, kind_of(format, path)) as new:
            with terminal.progress("loading"):
                options.choose_device(options.Device.CPU, threads)
                quantized = load(out, **repeated)
            tensors, reference = compared_on(
                terminal, out, quantized, FORMATS[format].on_integers, data, images, preprocessing, weights, repeated
            )
            written = {"float_io": float_io, "batch": batch, "opset": opset}
            with terminal.progress("exporting") as update:
                report = write_compared(quantized, format, new, tensors, written, reference, shown_by(update))
            size = 0 if report.broken else _size(new)
        values, tables = shown(report)
        where = "nowhere, since a promise is broken" if report.broken else f"{path}, {size / 1e6:.1f} MB"
        about = {"output": None if report.broken else str(path), "format": str(format), "bytes": size}
        terminal.result({**about, "parity": values}, *tables, facts({"format": str(format), "written to": where}))
        end(terminal, report)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else list(path.iterdir())
    return sum(file.stat().st_size for file in files)

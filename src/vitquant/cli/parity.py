"""`vitquant parity`: comparison of the forms of a saved model."""

from __future__ import annotations

import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitquant.cli import options
from vitquant.cli.checking import Data, Images, compare_forms, end, shown
from vitquant.cli.evaluate import Weights
from vitquant.cli.terminal import Terminal
from vitquant.errors import ExportError, LoweringError

if TYPE_CHECKING:
    from vitquant.model import QuantizedModel
    from vitquant.parity import Form


class Runtime(StrEnum):
    """The runtimes of exported forms."""

    INTERPRETER = "interpreter"
    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"


_FORMATS = {
    Runtime.INTERPRETER: ("program",),
    Runtime.ONNXRUNTIME: ("onnx-integer", "onnx-qdq"),
    Runtime.OPENVINO: ("openvino",),
}

Against = Annotated[
    list[Runtime] | None,
    typer.Option(help="Runtimes. An export that is missing is made for the comparison only."),
]


Also = Annotated[
    list[Runtime] | None, typer.Argument(metavar="[RUNTIME]...", help="Further runtimes, as for --against.")
]


def parity(
    out: options.Saved,
    also: Also = None,
    against: Against = None,
    data: Data = None,
    images: Images = 64,
    weights: Weights = None,
    model: options.Repeated = None,
    model_arguments: options.RepeatedArguments = None,
    preprocessing: options.PreprocessingFile = None,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Compare float, simulation, integer program and exported forms on the same images; exit code 1 when they differ.

    Without --against it is every form that was exported into OUT.
    """
    with Terminal(json, quiet) as terminal, tempfile.TemporaryDirectory() as scratch:
        with terminal.progress("loading"):
            from vitquant.loading import load

            options.choose_device(options.Device.CPU, threads)
            repeated = options.repeated(model, model_arguments)
            quantized = load(out, **repeated)
            forms = _forms(quantized, out, [*(against or ()), *(also or ())], Path(scratch))
        report = compare_forms(terminal, out, quantized, forms, data, images, preprocessing, weights, repeated)
        values, tables = shown(report)
        terminal.result(values, *tables)
        end(terminal, report)


def _forms(quantized: QuantizedModel, out: Path, against: list[Runtime], scratch: Path) -> list[Form]:
    from vitquant.engines import forms_of, program_of
    from vitquant.exports.formats import FORMATS, exported, write

    found = exported(out)
    if not against and found:
        return [form for format, path in found.items() for form in forms_of(path, format, quantized)]
    forms: list[Form] = []
    program, refused = program_of(quantized)
    lowers = program is not None
    if not against and not lowers:
        raise ExportError(
            f"{out} holds nothing to compare: nothing was exported, and the model does not lower: {refused}; "
            f"vitquant export {out} --format onnx-qdq"
        )
    if not lowers and Runtime.INTERPRETER in against:
        raise LoweringError(f"--against interpreter: {refused}")
    for format in dict.fromkeys(format for runtime in against for format in _FORMATS[runtime]):
        path = found.get(format)
        if path is None and (not FORMATS[format].on_integers or lowers):
            path = scratch / FORMATS[format].path
            write(quantized, format, path)
        forms += [] if path is None else forms_of(path, format, quantized)
    return forms

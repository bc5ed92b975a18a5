"""The formats that a quantized model can be handed on in, and where they lie beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vitquant.errors import ExportError
from vitquant.exports.sizes import check_batch_and_opset
from vitquant.files import Directory, recover, replacing, write_file
from vitquant.lowering import lower
from vitquant.model import QuantizedModel
from vitquant.model.checkpoint import CONFIG, TENSORS, is_saved_model


@dataclass(frozen=True)
class Format:
    """One format that a model is written in.

    Arguments:
        path: where it lies in the directory of the saved model; quantizing into that again removes it with the model
            that it was made from.
        on_integers: whether it is of the integer program, which not every model has, and computes it bit for bit.
        write: a model, where nothing is yet, with the options `float_io`, `batch` and `opset`.
        directory: what kind of directory it is; None for a file.
    """

    path: str
    on_integers: bool
    write: Callable[[QuantizedModel, Path, Options], None]
    directory: Callable[[], Directory | None] = lambda: None


@dataclass(frozen=True)
class Options:
    """What a caller chooses of an export, see `write`."""

    float_io: bool = False
    batch: int | None = None
    opset: int | None = None


def _program(model: QuantizedModel, path: Path, options: Options) -> None:
    from vitquant.program.storage import save_program

    save_program(lower(model), path)


def _onnx_integer(model: QuantizedModel, path: Path, options: Options) -> None:
    from vitquant.exports.onnx_integer import onnx_integer_model

    proto = onnx_integer_model(lower(model), options.float_io, options.batch, options.opset)
    write_file(path, proto.SerializeToString())


def _onnx_qdq(model: QuantizedModel, path: Path, options: Options) -> None:
    from vitquant.exports.qdq import onnx_qdq_model

    write_file(path, onnx_qdq_model(model, options.batch, options.opset).SerializeToString())


def _openvino(model: QuantizedModel, path: Path, options: Options) -> None:
    from vitquant.exports.openvino import write_openvino

    write_openvino(model, path, batch=options.batch)


def _openvino_directory() -> Directory:
    from vitquant.exports.openvino import OPENVINO_MODEL

    return OPENVINO_MODEL


FORMATS = {
    "program": Format("integer.program", True, _program),
    "onnx-integer": Format("integer.onnx", True, _onnx_integer),
    "onnx-qdq": Format("qdq.onnx", False, _onnx_qdq),
    "openvino": Format("openvino", False, _openvino, _openvino_directory),
}


def exported(directory: str | Path) -> dict[str, Path]:
    """What was exported into the directory of a saved model, by format."""
    paths = {name: Path(directory, format.path) for name, format in FORMATS.items()}
    for path in paths.values():
        recover(path)
    return {name: path for name, path in paths.items() if path.exists()}


def check_options(format: str, float_io: bool = False, batch: int | None = None, opset: int | None = None) -> None:
    """Refuse what a format cannot have, before long work rather than after; see `write`.

    Raises:
        ExportError: it says what belongs to which format.
    """
    if format not in FORMATS:
        raise ExportError(f"format {format!r} is unknown; the formats are: {', '.join(FORMATS)}")
    if float_io and format != "onnx-integer":
        raise ExportError(f"--float-io (float_io=True) belongs to onnx-integer; {format} has the ends that it has")
    check_batch_and_opset(format, batch, opset)


def kind_of(format: str, path: str | Path) -> Directory | None:
    """What `vitquant.files.replacing` takes for a format: the kind of directory that it is, or None for a file.

    Raises:
        ExportError: the path is that of a saved model's own file.
    """
    target = Path(os.path.realpath(path))
    if target.name in (TENSORS, CONFIG) and is_saved_model(target.parent):
        raise ExportError(f"{path} is a file of the saved model; give another path")
    return FORMATS[format].directory()


def write(
    model: QuantizedModel,
    format: str,
    path: str | Path,
    force: bool = False,
    float_io: bool = False,
    batch: int | None = None,
    opset: int | None = None,
) -> None:
    """Write a model in a format of another runtime.

    Arguments:
        model: calibrated.
        format: `program`, the integer program as vitquant reads it; `onnx-integer`, the same program in ONNX's integer
            operators; `onnx-qdq`, the simulation as ONNX's quantize and dequantize operators; `openvino`, that as
            OpenVINO's own files.
        path: the file, or for `openvino` the directory.
        force: replace what is there.
        float_io: for `onnx-integer`, take images and give outputs in float32 instead of codes.
        batch: how many images the file takes at once, so that every size in it is a number; any number when None. The
            metadata says it; `runtime` and `evaluate` fill up the last batch.
        opset: for ONNX, the version of its operators, 18 to 25; 20 or 21 when None.

    Raises:
        ExportError: the format is unknown, cannot hold the model or have that batch or opset, or its extra is not
            installed; the path exists and not `force`, or cannot be written.
        LoweringError: the model does not lower, for `program` and `onnx-integer`; it names the site and the reason.
    """
    check_options(format, float_io, batch, opset)
    with replacing(path, force, kind_of(format, path)) as new:
        FORMATS[format].write(model, new, Options(float_io, batch, opset))

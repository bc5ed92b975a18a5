"""The formats to which a quantized model can be exported, and their paths in the directory of a saved model."""

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
    """One export format.

    Arguments:
        path: its path in the directory of the saved model; overwriting the saved model removes it too.
        on_integers: whether it is an export of the integer program, which not every model has, bit for bit.
        write: writes a model to a path that does not exist yet, with options.
        directory: returns the kind of directory that the export is; None for a file.
    """

    path: str
    on_integers: bool
    write: Callable[[QuantizedModel, Path, Options], None]
    directory: Callable[[], Directory | None] = lambda: None


@dataclass(frozen=True)
class Options:
    """The options of an export, see `write`."""

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
    """The exports in the directory of a saved model, by format."""
    paths = {name: Path(directory, format.path) for name, format in FORMATS.items()}
    for path in paths.values():
        recover(path)
    return {name: path for name, path in paths.items() if path.exists()}


def check_options(format: str, float_io: bool = False, batch: int | None = None, opset: int | None = None) -> None:
    """Refuse options that a format does not support, before any long work; see `write`.

    Raises:
        ExportError: the format or an option is not supported; the message says which formats support the option.
    """
    if format not in FORMATS:
        raise ExportError(f"format {format!r} is unknown; the formats are: {', '.join(FORMATS)}")
    if float_io and format != "onnx-integer":
        raise ExportError(
            f"--float-io (float_io=True) applies to onnx-integer only; inputs and outputs of {format} are fixed"
        )
    check_batch_and_opset(format, batch, opset)


def kind_of(format: str, path: str | Path) -> Directory | None:
    """The kind of directory that a format is, or None for a file, as `vitquant.files.replacing` takes it.

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
        format: `program`, the integer program in vitquant's own format; `onnx-integer`, the same program in ONNX's
            integer operators; `onnx-qdq`, the simulation with ONNX's QuantizeLinear and DequantizeLinear; `openvino`,
            the same as OpenVINO's own files.
        path: the file, or for `openvino` the directory.
        force: replace an existing file or directory.
        float_io: for `onnx-integer`, whether input and outputs are float32 instead of codes.
        batch: a fixed batch size, with which every size in the file is a number; any when None. It is in the metadata;
            `runtime` and `evaluate` pad the last batch.
        opset: for ONNX, the version of its operators, 18 to 25; 20 or 21 when None.

    Raises:
        ExportError: the format is unknown, cannot represent the model or does not support that batch or opset, or its
            extra is not installed; the path exists and `force` is false, or it cannot be written.
        LoweringError: for `program` and `onnx-integer`, the model cannot be lowered; the message names the site and the
            reason.
    """
    check_options(format, float_io, batch, opset)
    with replacing(path, force, kind_of(format, path)) as new:
        FORMATS[format].write(model, new, Options(float_io, batch, opset))

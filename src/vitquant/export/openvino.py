"""A quantized model as OpenVINO IR, made of its ONNX form."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from vitquant.errors import ExportError
from vitquant.export.onnx_qdq import onnx_qdq_model
from vitquant.files import put_in_place, share
from vitquant.model import QuantizedModel
from vitquant.runtime.openvino import openvino_core

if TYPE_CHECKING:
    import onnx

_IR = "model.xml"


def write_openvino(
    model: QuantizedModel | onnx.ModelProto, directory: str | Path, force: bool = False, batch: int | None = None
) -> None:
    """Write `model.xml` and `model.bin`, OpenVINO's own form, which C++, Python and others load without ONNX.

    The directory holds both or, when the run is killed, what it held before. The facts of the ONNX model's
    `metadata_props` are in the XML, under `rt_info/framework`.

    Arguments:
        model: calibrated; or what `onnx_qdq_model` made of one, when that is there already.
        directory: made, with its parents, when missing.
        force: replace an OpenVINO model that is there.
        batch: fixed; any when None. An ONNX model has its own.

    Raises:
        CalibrationError: a quantizer is missing.
        ExportError: see `onnx_qdq_model`; the extra `openvino` is not installed; the directory cannot be written, or is
            not empty and not `force`, or holds something else.
    """
    directory = Path(directory).absolute()
    check_directory(directory, force)
    core = openvino_core()
    import openvino

    proto = onnx_qdq_model(model, batch) if isinstance(model, QuantizedModel) else model
    converted = core.read_model(proto.SerializeToString())
    partial = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
        openvino.save_model(converted, partial / _IR, compress_to_fp16=False)  # halved scales would be other scales
        for file in partial.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        share(partial)
        put_in_place(partial, directory)
    except (OSError, RuntimeError) as error:  # OpenVINO's word for a full disk is RuntimeError
        raise ExportError(f"{directory} could not be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def check_directory(directory: Path, force: bool = False) -> None:
    """Refuse a directory that cannot be written, before long work rather than after.

    Raises:
        ExportError: it is a file, is not empty and not `force`, holds something else, or its parent cannot be written.
    """
    directory = directory.absolute()
    if directory.is_file():
        raise ExportError(f"{directory} is a file; give a directory")
    if directory.is_dir() and any(directory.iterdir()):
        if not force:
            raise ExportError(
                f"{directory} is not empty; give another directory, or --force (force=True) to replace it"
            )
        if not (directory / _IR).is_file():
            raise ExportError(f"{directory} is not empty and holds no OpenVINO model; remove it yourself")
    parent = next(folder for folder in directory.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(f"{parent} cannot be written; give another directory")

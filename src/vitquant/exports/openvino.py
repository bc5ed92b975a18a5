"""A quantized model as OpenVINO IR, made of its ONNX form."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vitquant.errors import ExportError
from vitquant.exports.qdq import onnx_qdq_model
from vitquant.files import Directory, replacing
from vitquant.model import QuantizedModel
from vitquant.runtime.openvino import openvino_core, seal

if TYPE_CHECKING:
    import onnx

_IR = "model.xml"
_BLOCK = 2**20  # bytes
OPENVINO_MODEL = Directory(
    "OpenVINO model", {_IR: None, "model.bin": None, "digest.json": None}, lambda directory: (directory / _IR).is_file()
)


def write_openvino(
    model: QuantizedModel | onnx.ModelProto, directory: str | Path, force: bool = False, batch: int | None = None
) -> None:
    """Write `model.xml` and `model.bin`, OpenVINO's own form, which C++, Python and others load without ONNX.

    `digest.json` beside them says what was in them. The directory holds all or, when the run is killed, what it held
    before. The facts of the ONNX model's `metadata_props` are in the XML, under `rt_info/framework`.

    Arguments:
        model: calibrated; or what `onnx_qdq_model` made of one, when that is there already.
        directory: made, with its parents, when missing.
        force: replace an OpenVINO model that is there.
        batch: fixed; any when None. An ONNX model has its own.

    Raises:
        CalibrationError: a quantizer is missing.
        ExportError: see `onnx_qdq_model` and `vitquant.files.replacing`; or the extra `openvino` is not installed.
    """
    with replacing(directory, force, OPENVINO_MODEL) as new:
        core = openvino_core()
        import openvino

        proto = onnx_qdq_model(model, batch) if isinstance(model, QuantizedModel) else model
        converted = core.read_model(proto.SerializeToString())
        try:
            new.mkdir()
            openvino.save_model(converted, new / _IR, compress_to_fp16=False)  # halved scales would be other scales
            seal(new)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or _refusal(new, proto.ByteSize()) or f"OpenVINO says: {error}"
            raise ExportError(f"{directory} could not be written: {reason}") from error


def _refusal(directory: Path, size: int) -> str:
    """Why the operating system takes no more bytes in a directory, which OpenVINO does not hand on; empty when it does.

    Arguments:
        size: bytes to try.
    """
    try:
        with (directory / "probe").open("wb") as file:
            for _ in range(0, size, _BLOCK):
                file.write(bytes(_BLOCK))
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""

"""A quantized model as OpenVINO IR, converted from its ONNX form."""

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
    """Write `model.xml` and `model.bin`, OpenVINO's own format, which C++, Python and others load without ONNX.

    `digest.json` beside them has their digests. When the run is killed, the directory is left as it was before. The
    facts of the ONNX model's `metadata_props` are in the XML, under `rt_info/framework`.

    Arguments:
        model: a calibrated model, or the ONNX model that `onnx_qdq_model` returned for it.
        directory: created, with its parents, when missing.
        force: replace an existing OpenVINO model.
        batch: a fixed batch size; any when None. For an ONNX model, the batch is its own.

    Raises:
        CalibrationError: a quantizer is missing.
        ExportError: see `onnx_qdq_model` and `vitquant.files.replacing`; or the extra `openvino` is not installed.
    """
    with replacing(directory, force, OPENVINO_MODEL) as new:
        core = openvino_core()
        import openvino

        proto = onnx_qdq_model(model, batch) if isinstance(model, QuantizedModel) else model
        converted = core.read_model(proto.SerializeToString())
        for output, named in zip(converted.outputs, proto.graph.output, strict=True):
            output.get_tensor().set_names({named.name})  # of all names that a tensor has, the output's
        try:
            new.mkdir()
            openvino.save_model(converted, new / _IR, compress_to_fp16=False)  # float16 would round the scales
            seal(new)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or _refusal(new, proto.ByteSize()) or f"OpenVINO says: {error}"
            raise ExportError(f"{directory} could not be written: {reason}") from error


def _refusal(directory: Path, size: int) -> str:
    """The operating system's reason for a failed write, which OpenVINO does not report, found by writing a file.

    Arguments:
        size: the number of bytes to write.

    Returns:
        The reason; empty if the file can be written.
    """
    try:
        with (directory / "probe").open("wb") as file:
            for _ in range(0, size, _BLOCK):
                file.write(bytes(_BLOCK))
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""

"""The formats that a quantized model can be handed on in, and where they lie beside it."""

from __future__ import annotations

from pathlib import Path

from vitquant.checkpoint import CONFIG, TENSORS
from vitquant.errors import ExportError
from vitquant.export.sizes import check_batch_and_opset
from vitquant.files import check_new_file, write_file
from vitquant.lowering import lower
from vitquant.model import QuantizedModel

# Names in the directory of the saved model; quantizing into it again removes them with the model they were made from.
PATHS = {
    "program": "integer.program",
    "onnx-integer": "integer.onnx",
    "onnx-qdq": "qdq.onnx",
    "openvino": "openvino",
}
ON_INTEGERS = ("program", "onnx-integer")  # those of the integer program, which not every model has


def exported(directory: str | Path) -> dict[str, Path]:
    """What was exported into the directory of a saved model, by format."""
    return {name: Path(directory, path) for name, path in PATHS.items() if Path(directory, path).exists()}


def check_options(format: str, float_io: bool = False, batch: int | None = None, opset: int | None = None) -> None:
    """Refuse what a format cannot have, before long work rather than after; see `write`.

    Raises:
        ExportError: it says what belongs to which format.
    """
    if format not in PATHS:
        raise ExportError(f"format {format!r} is unknown; the formats are: {', '.join(PATHS)}")
    if float_io and format != "onnx-integer":
        raise ExportError(f"--float-io (float_io=True) belongs to onnx-integer; {format} has the ends that it has")
    check_batch_and_opset(format, batch, opset)


def check_target(format: str, path: Path, force: bool = False) -> None:
    """Refuse a place that cannot be written, before long work rather than after.

    Raises:
        ExportError: it exists and not `force`, is of the wrong kind, or its parent cannot be written.
    """
    if path.name in (TENSORS, CONFIG) and (path.parent / CONFIG).is_file():
        raise ExportError(f"{path} is a file of the saved model; give another path")
    if format == "openvino":
        from vitquant.export.openvino import check_directory

        check_directory(path, force)
    else:
        check_new_file(path, force)


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
        float_io: for `onnx-integer`, take images and give logits in float32 instead of codes.
        batch: how many images the file takes at once, so that every size in it is a number; any number when None. The
            metadata says it; `runtime` and `evaluate` fill up the last batch.
        opset: for ONNX, the version of its operators, 18 to 25; 20 or 21 when None.

    Raises:
        ExportError: the format is unknown, cannot hold the model or have that batch or opset, or its extra is not
            installed; the path exists and not `force`, or cannot be written.
        LoweringError: the model does not lower, for `program` and `onnx-integer`; it names the site and the reason.
    """
    path = Path(path)
    check_options(format, float_io, batch, opset)
    check_target(format, path, force)
    match format:
        case "program":
            from vitquant.program.storage import save_program

            save_program(lower(model), path, force)
        case "onnx-integer":
            from vitquant.export.onnx_integer import onnx_integer_model

            write_file(path, onnx_integer_model(lower(model), float_io, batch, opset).SerializeToString(), force)
        case "onnx-qdq":
            from vitquant.export.onnx_qdq import onnx_qdq_model

            write_file(path, onnx_qdq_model(model, batch, opset).SerializeToString(), force)
        case _:
            from vitquant.export.openvino import write_openvino

            write_openvino(model, path, force, batch)

"""What a caller may fix of an export: the batch, and the version of ONNX's operators."""

from __future__ import annotations

from vitquant.errors import ExportError

LARGEST_BATCH = 1_000_000  # images that may be asked for at once; the memory for them is another matter
OPSETS = {  # that a format can have; what is tested is that ONNX Runtime computes the same with each
    "onnx-integer": range(18, 26),
    "onnx-qdq": range(18, 26),
}


def check_batch_and_opset(format: str, batch: int | None = None, opset: int | None = None) -> None:
    """Refuse what a format cannot have.

    Arguments:
        format: one of `formats.FORMATS`.
        batch: how many images the file takes at once; any number when None.
        opset: the version of ONNX's operators; the exporter's choice when None.

    Raises:
        ExportError: it says what the format can have.
    """
    if batch is not None and format == "program":
        raise ExportError("--batch (batch=...) belongs to ONNX and OpenVINO files; a program runs any batch")
    if batch is not None and batch < 1:
        raise ExportError(f"batch = {batch}: a file takes at least 1 image")
    if batch is not None and batch > LARGEST_BATCH:
        raise ExportError(f"batch = {batch}: a file takes at most {LARGEST_BATCH} images at once")
    if opset is None:
        return
    if format not in OPSETS:
        raise ExportError(f"--opset (opset=...) belongs to {' and '.join(OPSETS)}; {format} has none")
    if opset not in OPSETS[format]:
        raise ExportError(f"opset {opset}: {format} can have {OPSETS[format][0]} to {OPSETS[format][-1]}")

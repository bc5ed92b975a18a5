"""The checks of an export's fixed batch size and of its opset."""

from __future__ import annotations

from vitquant.errors import ExportError

LARGEST_BATCH = 1_000_000  # images in a batch, even if there is memory for more
OPSETS = {  # supported by each format; tests check that ONNX Runtime computes the same with each of them
    "onnx-integer": range(18, 26),
    "onnx-qdq": range(18, 26),
}


def check_batch_and_opset(format: str, batch: int | None = None, opset: int | None = None) -> None:
    """Refuse a batch size or an opset that a format does not support.

    Arguments:
        format: one of `formats.FORMATS`.
        batch: the fixed batch size; any when None.
        opset: the version of ONNX's operators; the exporter's choice when None.

    Raises:
        ExportError: one is not supported; the message says what the format supports.
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

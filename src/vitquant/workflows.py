"""What is done with a quantized model, as the command line does it: evaluate, compare, export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vitquant.calibration_data import Batch, images_of
from vitquant.engines import default_engine, engine, forms_of
from vitquant.errors import CalibrationError, ExportError
from vitquant.exports.formats import check_options, kind_of, write
from vitquant.files import discard, replacing
from vitquant.model import QuantizedModel
from vitquant.parity import Form, ParityReport, examine
from vitquant.progress import Progress, silent
from vitquant.tasks import classification
from vitquant.tasks.classification import ClassificationResult

Logits = Callable[[Tensor], Any]


class BrokenPromiseError(ExportError):
    """An export is not what was evaluated, and was not written.

    Arguments:
        report: the comparison.
    """

    def __init__(self, report: ParityReport) -> None:
        super().__init__(f"nothing was written, since promises are broken: {'; '.join(report.broken)}")
        self.report = report


def evaluate(
    model: QuantizedModel,
    data: Iterable[tuple[Tensor, Tensor]],
    *,
    float_model: Logits | None = None,
    engine_name: str | None = None,
    directory: str | Path | None = None,
    progress: Progress = silent,
) -> ClassificationResult:
    """Accuracy of a quantized classifier, beside its float model on the same images.

    Arguments:
        model: calibrated.
        data: batches of images, float32 (batch, channels, height, width), and classes, int64 (batch,).
        float_model: to compare with.
        engine_name: what computes, one of `engines.ENGINES`; the integer program once the model lowers, else the
            simulation, when None.
        directory: where exports are looked for, which `onnxruntime` and `openvino` run.
        progress: told how many images are done.

    Raises:
        ModelError, DataError: see `tasks.classification.evaluate`.
        ExportError, LoweringError: see `engines.engine`.
    """
    if engine_name is None:
        engine_name, computed, _ = default_engine(model)
    else:
        computed = engine(engine_name, model, "." if directory is None else directory)
    return classification.evaluate(computed, float_model, data, None, progress, engine_name)


def compare(
    model: QuantizedModel,
    images: Iterable[Batch],
    forms: Sequence[Form] = (),
    *,
    float_model: Logits | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Run all forms of a model on the same images: float, simulation, integer program, and what was exported.

    Arguments:
        model: calibrated.
        images: a few batches, as `quantize` takes them; they are held in memory.
        forms: exported ones, from `engines.forms_of`.
        float_model: what the model was made from.
        progress: told which form is run, how many were, and how many there are.

    Returns:
        The comparisons, and `broken`: the promises that do not hold.

    Raises:
        CalibrationError: there are no images.
    """
    batches = [images_of(batch) for batch in images]
    if not batches:
        raise CalibrationError("no images to compare on: give at least one batch")
    return examine(model, batches, forms, float_model, progress)


def export(
    model: QuantizedModel,
    format: str,
    path: str | Path,
    images: Iterable[Batch],
    *,
    float_model: Logits | None = None,
    force: bool = False,
    float_io: bool = False,
    batch: int | None = None,
    opset: int | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Write a model for another runtime, once it was run there and is what it should be.

    Arguments:
        model: calibrated.
        format, path, force, float_io, batch, opset: see `export.formats.write`.
        images, float_model, progress: see `compare`.

    Returns:
        What the comparison with the model found.

    Raises:
        BrokenPromiseError: the export is not the model; nothing is written.
        ExportError, LoweringError: see `export.formats.write`.
        CalibrationError: there are no images.
    """
    check_options(format, float_io, batch, opset)
    with replacing(path, force, kind_of(format, path)) as new:
        options = {"float_io": float_io, "batch": batch, "opset": opset}
        report = write_compared(model, format, new, images, options, float_model, progress)
    if report.broken:
        raise BrokenPromiseError(report)
    return report


def write_compared(
    model: QuantizedModel,
    format: str,
    new: Path,
    images: Iterable[Batch],
    options: dict[str, Any],
    float_model: Logits | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Write an export to a place where nothing is yet, run it, and remove it again where a promise is broken.

    Arguments:
        new: from `files.replacing`.
        options: `float_io`, `batch` and `opset` of `export.formats.write`.
        model, format, images, float_model, progress: see `export`.
    """
    progress("exporting", 0, 1)
    write(model, format, new, **options)
    report = compare(model, images, forms_of(new, format, model), float_model=float_model, progress=progress)
    if report.broken:
        discard(new)
    return report

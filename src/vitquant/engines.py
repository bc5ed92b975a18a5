"""What can compute a saved model's outputs from images, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitquant.errors import ExportError, LoweringError, VitquantError
from vitquant.exports.formats import ON_INTEGERS, exported
from vitquant.lowering import lower
from vitquant.model import QuantizedModel
from vitquant.model.saved import digest
from vitquant.parity import Form
from vitquant.program.instructions import IntegerProgram
from vitquant.runtime.metadata import fact_of, to_metadata
from vitquant.runtime.on_images import OnImages, interpreted, quantization_from
from vitquant.runtime.onnxruntime import OnnxModel

ENGINES = ("float", "simulated", "integer", "onnxruntime", "onnx-integer", "onnx-qdq", "openvino")
_RUNS = {  # the formats that an engine runs, of several the first that was exported
    "onnxruntime": ("onnx-integer", "onnx-qdq"),
    "onnx-integer": ("onnx-integer",),
    "onnx-qdq": ("onnx-qdq",),
    "openvino": ("openvino",),
}
Engine = Callable[[Any], Any]


def program_of(model: QuantizedModel) -> tuple[IntegerProgram | None, str]:
    """The integer program of a model; or None, and why there is none."""
    try:
        return lower(model), ""
    except LoweringError as reason:
        return None, str(reason)


def default_engine(model: QuantizedModel) -> tuple[str, Engine, str]:
    """The integer program once the model lowers, else the simulation: its name, itself, and why it is no other."""
    program, reason = program_of(model)
    return ("simulated", model, reason) if program is None else ("integer", interpreted(program), "")


def file_of(name: str, directory: str | Path) -> Path | None:
    """The exported file, or OpenVINO's directory, that an engine runs; None where there is none."""
    files = exported(directory)
    return next((files[format] for format in _RUNS.get(name, ()) if format in files), None)


def engine(name: str, model: QuantizedModel, directory: str | Path, threads: int | None = None) -> Engine:
    """What computes a model's outputs from float32 images (batch, channels, height, width).

    Arguments:
        name: one of `ENGINES` but `float`, which is not made of the quantized model. `onnxruntime` runs the integer
            ONNX file, or the QDQ one where that is all there is; `onnx-integer` and `onnx-qdq` say which.
        model: what `directory` holds.
        directory: where exports are looked for.
        threads: that a runtime of its own uses; its choice when None.

    Raises:
        ExportError: the name is unknown, nothing was exported for that runtime, or it was of another model.
        LoweringError: `integer` or `onnx-integer`, of a model that does not lower.
    """
    match name:
        case "simulated":
            return model
        case "integer":
            return interpreted(lower(model))
        case "onnxruntime" | "onnx-integer" | "onnx-qdq" | "openvino":
            path = file_of(name, directory)
            if path is None:
                raise _nothing_for(name, model, directory)
            if name != "openvino":
                loaded = OnnxModel(path, threads=threads)
                _refuse_another(model, loaded.metadata, path)
                return on_images(loaded)
            from vitquant.runtime.openvino import OpenVinoModel

            loaded = OpenVinoModel(path, threads=threads)
            _refuse_another(model, loaded.metadata, path)
            return loaded
        case _:
            raise ExportError(f"engine {name!r} is unknown; the engines are: {', '.join(ENGINES)}")


def on_images(model: OnnxModel) -> Engine:
    """An ONNX model as a function of float images, whether it takes those or codes."""
    return OnImages(model, *quantization_from(model.metadata, model.outputs)) if model.takes_codes else model


def forms_of(path: str | Path, format: str, model: QuantizedModel | None = None) -> list[Form]:
    """What was exported to a path, as each of its runtimes computes it.

    Arguments:
        path: of the file, or for `openvino` of the directory.
        format: what it was exported as.
        model: what it has to be an export of; None when that is not known.

    Raises:
        ExportError: it cannot be run, or says that it is of another model.
        CheckpointError: `program`, of no valid file.
    """
    path = Path(path)
    match format:
        case "program":
            from vitquant.program.storage import load_program
            from vitquant.runtime.interpreter import Interpreter

            program = load_program(path)
            _refuse_another(model, to_metadata(program.facts), path)
            return [Form("interpreter, stored program", Interpreter(program), exact=True, on_codes=True)]
        case "onnx-integer" | "onnx-qdq":
            names = {True: f"onnxruntime, {format}", False: f"onnxruntime, {format}, not optimized"}
            models = {name: OnnxModel(path, optimize=optimize) for optimize, name in names.items()}
            exact = format == "onnx-integer"
            _refuse_another(model, models[names[True]].metadata, path)
            return [Form(name, loaded, exact, loaded.takes_codes) for name, loaded in models.items()]
        case _:
            from vitquant.runtime.openvino import OpenVinoModel

            loaded = OpenVinoModel(path)
            _refuse_another(model, loaded.metadata, path)
            return [Form("openvino", loaded, exact=False)]


def _refuse_another(model: QuantizedModel | None, metadata: Mapping[str, str], path: Path) -> None:
    """Refuse a file that does not say that it is of this model, or that nothing would tell when it was altered."""
    if model is None:
        return
    if fact_of(metadata, "model") != digest(model):
        raise ExportError(
            f"{path} was exported from another model than that of {path.parent}; export it again, with --force"
        )
    if path.suffix == ".onnx" and fact_of(metadata, "digest") is None:
        raise ExportError(f"{path} does not say what was in it when it was exported; export it again, with --force")


def _nothing_for(name: str, model: QuantizedModel, directory: str | Path) -> VitquantError:
    """What to export for an engine, of what the model allows."""
    program, refused = program_of(model)
    possible = [format for format in _RUNS[name] if program is not None or format not in ON_INTEGERS]
    if not possible:
        return LoweringError(f"{directory} holds nothing for {name}, and cannot: {refused}")
    return ExportError(f"{directory} holds nothing for {name}: vitquant export {directory} --format {possible[0]}")

"""What can compute a saved model's logits from images, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitquant.errors import ExportError, LoweringError
from vitquant.export.formats import exported
from vitquant.lowering import lower
from vitquant.model import QuantizedModel
from vitquant.parity import Form
from vitquant.program.instructions import IntegerProgram
from vitquant.runtime.on_images import Ends, OnImages, interpreted
from vitquant.runtime.onnxruntime import OnnxModel

ENGINES = ("float", "simulated", "integer", "onnxruntime", "openvino")
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


def engine(name: str, model: QuantizedModel, directory: Path, threads: int | None = None) -> Engine:
    """What computes logits, (images, classes), from float32 images (batch, channels, height, width).

    Arguments:
        name: one of `ENGINES` but `float`, which is not made of the quantized model.
        model: what `directory` holds.
        directory: where exports are looked for.
        threads: that a runtime of its own uses; its choice when None.

    Raises:
        ExportError: the name is unknown, or nothing was exported for that runtime.
        LoweringError: `integer`, of a model that does not lower.
    """
    match name:
        case "simulated":
            return model
        case "integer":
            return interpreted(lower(model))
        case "onnxruntime":
            files = exported(directory)
            path = files.get("onnx-integer") or files.get("onnx-qdq")
            if path is None:
                raise _nothing_for(name, directory, "onnx-integer")
            return on_images(OnnxModel(path, threads=threads))
        case "openvino":
            path = exported(directory).get("openvino")
            if path is None:
                raise _nothing_for(name, directory, "openvino")
            from vitquant.runtime.openvino import OpenVinoModel

            return OpenVinoModel(path, threads=threads)
        case _:
            raise ExportError(f"engine {name!r} is unknown; the engines are: {', '.join(ENGINES)}")


def on_images(model: OnnxModel) -> Engine:
    """An ONNX model as a function of float images, whether it takes those or codes."""
    return OnImages(model, Ends.from_metadata(model.metadata)) if model.takes_codes else model


def forms_of(path: Path, format: str) -> list[Form]:
    """What was exported to a path, as each of its runtimes computes it.

    Arguments:
        path: of the file, or for `openvino` of the directory.
        format: what it was exported as.
    """
    match format:
        case "program":
            from vitquant.program.storage import load_program
            from vitquant.runtime.interpreter import Interpreter

            return [Form("interpreter, stored program", Interpreter(load_program(path)), exact=True, on_codes=True)]
        case "onnx-integer" | "onnx-qdq":
            names = {True: f"onnxruntime, {format}", False: f"onnxruntime, {format}, not optimized"}
            models = {name: OnnxModel(path, optimize=optimize) for optimize, name in names.items()}
            exact = format == "onnx-integer"
            return [Form(name, model, exact, model.takes_codes) for name, model in models.items()]
        case _:
            from vitquant.runtime.openvino import OpenVinoModel

            return [Form("openvino", OpenVinoModel(path), exact=False)]


def _nothing_for(name: str, directory: Path, format: str) -> ExportError:
    return ExportError(f"{directory} holds nothing for {name}: vitquant export {directory} --format {format}")

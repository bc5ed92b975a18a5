"""Engines, which compute a model's outputs from images: the quantized model itself, and runtimes of exported files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitquant.errors import ExportError, LoweringError, ModelError, VitquantError
from vitquant.exports.formats import FORMATS, exported
from vitquant.lowering import lower
from vitquant.model import QuantizedModel
from vitquant.model.saved import digest
from vitquant.parity import Form
from vitquant.program.instructions import IntegerProgram
from vitquant.runtime.metadata import fact_of, to_metadata
from vitquant.runtime.on_images import OnImages, Quantization, interpreted, quantization_from, quantization_of

Engine = Callable[[Any], Any]


@dataclass(frozen=True)
class Opened:
    """An exported file, ready to run.

    Arguments:
        run: maps codes to codes if there is `quantization`, else images to outputs.
        metadata: of the file.
        quantization: returns scales and zero points of input and outputs; None if the file takes images.
        sealed: whether the metadata must have a digest, which is checked when the file is read; the other formats
            cannot be read without theirs.
    """

    run: Engine
    metadata: Mapping[str, str]
    quantization: Callable[[], Quantization] | None = None
    sealed: bool = False

    @property
    def on_images(self) -> Engine:
        """The file as a function of float images.

        Raises:
            LoweringError: the file has no scales and zero points.
        """
        return self.run if self.quantization is None else OnImages(self.run, *self.quantization())


@dataclass(frozen=True)
class Way:
    """One way in which a runtime runs the files of a format.

    Arguments:
        name: for reports.
        open: opens a file, with a number of threads, or that of the runtime's choice when None.
    """

    name: str
    open: Callable[[Path, int | None], Opened]


def _interpreter(path: Path, threads: int | None) -> Opened:
    from vitquant.program.storage import load_program
    from vitquant.runtime.interpreter import Interpreter

    program = load_program(path)
    return Opened(Interpreter(program), to_metadata(program.facts), lambda: quantization_of(program))


def _onnxruntime(path: Path, threads: int | None, optimize: bool = True) -> Opened:
    from vitquant.runtime.onnxruntime import OnnxModel

    model = OnnxModel(path, optimize, threads)
    codes = (lambda: quantization_from(model.metadata, model.outputs)) if model.takes_codes else None
    return Opened(model, model.metadata, codes, sealed=True)


def _not_optimized(path: Path, threads: int | None) -> Opened:
    return _onnxruntime(path, threads, optimize=False)


def _openvino(path: Path, threads: int | None) -> Opened:
    from vitquant.runtime.openvino import OpenVinoModel

    model = OpenVinoModel(path, threads=threads)
    return Opened(model, model.metadata)


# For each format the ways to run its files: the first is used as the engine, and parity compares all of them.
WAYS: Mapping[str, Sequence[Way]] = {
    "program": (Way("interpreter, stored program", _interpreter),),
    **{
        format: (
            Way(f"onnxruntime, {format}", _onnxruntime),
            Way(f"onnxruntime, {format}, not optimized", _not_optimized),
        )
        for format in ("onnx-integer", "onnx-qdq")
    },
    "openvino": (Way("openvino", _openvino),),
}
_FLOAT = "float"  # the engine that is the float model, which the caller has
# Engines of the quantized model itself.
_OF_THE_MODEL: Mapping[str, Callable[[QuantizedModel], Engine]] = {
    "simulated": lambda model: model,
    "integer": lambda model: interpreted(lower(model)),
}
# Engines of exported files: the formats that each runs; the first one that was exported is used.
_OF_FILES: Mapping[str, Sequence[str]] = {
    "onnxruntime": ("onnx-integer", "onnx-qdq"),
    "onnx-integer": ("onnx-integer",),
    "onnx-qdq": ("onnx-qdq",),
    "openvino": ("openvino",),
}
ENGINES = (_FLOAT, *_OF_THE_MODEL, *_OF_FILES)


def program_of(model: QuantizedModel) -> tuple[IntegerProgram | None, str]:
    """The integer program of a model and an empty text, or None and the reason why it cannot be lowered."""
    try:
        return lower(model), ""
    except LoweringError as reason:
        return None, str(reason)


def default_engine(model: QuantizedModel) -> tuple[str, Engine, str]:
    """Name and engine: the integer program if the model can be lowered, else the simulation with the reason."""
    program, reason = program_of(model)
    return ("simulated", model, reason) if program is None else ("integer", interpreted(program), "")


def file_of(name: str, directory: str | Path) -> Path | None:
    """The exported file, or OpenVINO's directory, that an engine runs; None if there is none."""
    return next(iter(_files(name, directory).values()), None)


def engine(
    name: str,
    model: QuantizedModel,
    directory: str | Path = ".",
    threads: int | None = None,
    float_model: Engine | None = None,
) -> Engine:
    """The function that computes a model's outputs from float32 images (batch, channels, height, width).

    Arguments:
        name: one of `ENGINES`. `onnxruntime` runs the integer ONNX file, or the QDQ one if there is no other;
            `onnx-integer` and `onnx-qdq` choose one of them.
        model: the model that is saved in `directory`.
        directory: where exports are searched.
        threads: the number of threads of an external runtime; its choice when None.
        float_model: the engine `float`.

    Raises:
        ModelError: for `float`, there is no float model.
        ExportError: the name is unknown, nothing was exported for that runtime, or the export is of another model.
        LoweringError: for `integer` or `onnx-integer`, the model cannot be lowered.
    """
    if name == _FLOAT:
        if float_model is None:
            raise ModelError("engine 'float' is the float model, which is not there; --weights PATH (float_model=...)")
        return float_model
    if name in _OF_THE_MODEL:
        return _OF_THE_MODEL[name](model)
    if name not in _OF_FILES:
        raise ExportError(f"engine {name!r} is unknown; the engines are: {', '.join(ENGINES)}")
    for format, path in _files(name, directory).items():
        opened = WAYS[format][0].open(path, threads)
        _refuse_another(model, opened, path)
        return opened.on_images
    raise _nothing_for(name, model, directory)


def forms_of(path: str | Path, format: str, model: QuantizedModel | None = None) -> list[Form]:
    """The forms of an export for parity: the file in each of its runtimes.

    Arguments:
        path: of the file, or for `openvino` of the directory.
        format: in which it was exported.
        model: the model that must have been exported; None if that is not known.

    Raises:
        ExportError: the file cannot be run, or was exported from another model.
        CheckpointError: for `program`, the file is not valid.
    """
    path, forms = Path(path), []
    for way in WAYS[format]:
        opened = way.open(path, None)
        _refuse_another(model, opened, path)
        forms.append(Form(way.name, opened.run, FORMATS[format].on_integers, opened.quantization is not None))
    return forms


def _files(name: str, directory: str | Path) -> dict[str, Path]:
    """The exported files that an engine can run, by format, in order of preference."""
    files = exported(directory)
    return {format: files[format] for format in _OF_FILES.get(name, ()) if format in files}


def _refuse_another(model: QuantizedModel | None, opened: Opened, path: Path) -> None:
    """Refuse a file whose metadata do not name this model, or which has no digest to detect alterations."""
    if model is None:
        return
    if fact_of(opened.metadata, "model") != digest(model):
        raise ExportError(
            f"{path} was exported from another model than that of {path.parent}; export it again, with --force"
        )
    if opened.sealed and fact_of(opened.metadata, "digest") is None:
        raise ExportError(f"{path} does not say what was in it when it was exported; export it again, with --force")


def _nothing_for(name: str, model: QuantizedModel, directory: str | Path) -> VitquantError:
    """The error for a missing export, which names the format to export, or why the model has none."""
    program, refused = program_of(model)
    possible = [format for format in _OF_FILES[name] if program is not None or not FORMATS[format].on_integers]
    if not possible:
        return LoweringError(f"{directory} holds nothing for {name}, and cannot: {refused}")
    return ExportError(f"{directory} holds nothing for {name}: vitquant export {directory} --format {possible[0]}")

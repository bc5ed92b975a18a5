"""What computes a model's outputs from images: the quantized model itself, and the runtimes of exported files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitquant.errors import ExportError, LoweringError, VitquantError
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
        run: codes to codes, where there is `quantization`, else images to outputs.
        metadata: what the file says of itself.
        quantization: what the codes stand for, found out when it is asked for; None where there are none.
    """

    run: Engine
    metadata: Mapping[str, str]
    quantization: Callable[[], Quantization] | None = None

    @property
    def on_images(self) -> Engine:
        """The file as a function of float images.

        Raises:
            LoweringError: it does not say what its codes stand for.
        """
        return self.run if self.quantization is None else OnImages(self.run, *self.quantization())


@dataclass(frozen=True)
class Way:
    """One way in which a runtime runs the files of a format.

    Arguments:
        name: for reports.
        open: a file, with as many threads, or the runtime's choice for None.
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
    return Opened(model, model.metadata, codes)


def _not_optimized(path: Path, threads: int | None) -> Opened:
    return _onnxruntime(path, threads, optimize=False)


def _openvino(path: Path, threads: int | None) -> Opened:
    from vitquant.runtime.openvino import OpenVinoModel

    model = OpenVinoModel(path, threads=threads)
    return Opened(model, model.metadata)


# For each format the ways to run its files: the first is the engine, and all of them are compared.
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
# Engines of the quantized model itself; `float` is the model that it was made from, which the caller has.
_OF_THE_MODEL: Mapping[str, Callable[[QuantizedModel], Engine]] = {
    "simulated": lambda model: model,
    "integer": lambda model: interpreted(lower(model)),
}
# Engines of exported files: the formats that each runs, of several the first that was exported.
_OF_FILES: Mapping[str, Sequence[str]] = {
    "onnxruntime": ("onnx-integer", "onnx-qdq"),
    "onnx-integer": ("onnx-integer",),
    "onnx-qdq": ("onnx-qdq",),
    "openvino": ("openvino",),
}
ENGINES = ("float", *_OF_THE_MODEL, *_OF_FILES)


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
    return next(iter(_files(name, directory).values()), None)


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
    if name in _OF_THE_MODEL:
        return _OF_THE_MODEL[name](model)
    if name not in _OF_FILES:
        raise ExportError(f"engine {name!r} is unknown; the engines are: {', '.join(ENGINES)}")
    for format, path in _files(name, directory).items():
        opened = WAYS[format][0].open(path, threads)
        _refuse_another(model, opened.metadata, path)
        return opened.on_images
    raise _nothing_for(name, model, directory)


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
    path, forms = Path(path), []
    for way in WAYS[format]:
        opened = way.open(path, None)
        _refuse_another(model, opened.metadata, path)
        forms.append(Form(way.name, opened.run, FORMATS[format].on_integers, opened.quantization is not None))
    return forms


def _files(name: str, directory: str | Path) -> dict[str, Path]:
    """What an engine of files could run, by format, what it prefers first."""
    files = exported(directory)
    return {format: files[format] for format in _OF_FILES.get(name, ()) if format in files}


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
    possible = [format for format in _OF_FILES[name] if program is not None or not FORMATS[format].on_integers]
    if not possible:
        return LoweringError(f"{directory} holds nothing for {name}, and cannot: {refused}")
    return ExportError(f"{directory} holds nothing for {name}: vitquant export {directory} --format {possible[0]}")

"""Running exported files with OpenVINO on the CPU, from float images to floats."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitquant.errors import ExportError
from vitquant.files import sha256
from vitquant.parsing import parse_json, read_file
from vitquant.runtime.fixed_batch import in_batches
from vitquant.runtime.onnx_files import read_onnx
from vitquant.runtime.outputs import Outputs, given, mapped
from vitquant.schema import Table, Text, check

_FILES = ("model.xml", "model.bin")
_DIGEST = "digest.json"


class OpenVinoModel:
    """An exported model, compiled for this machine's CPU.

    Arguments:
        path: the directory that `write_openvino` wrote, an .xml file, or an .onnx file.
        precision: of the float operations: `f32`, or `bf16`, which is faster on newer CPUs, and OpenVINO's default
            there.
        threads: the number of threads; None lets OpenVINO choose.

    Attributes:
        metadata: the strings that the exporter wrote beside the graph, such as recipe and bits.
        batch: the fixed batch size of the file; None for any. Calls take any number of images.

    Raises:
        ExportError: the extra `openvino` is not installed, the file is missing, a directory's files were altered since
            they were exported, or OpenVINO refuses the model.

    Pitfall: in `bf16` a value between two quantizers has 8 significant bits, so that far more codes flip.
    """

    def __init__(self, path: str | Path, precision: str = "f32", threads: int | None = None) -> None:
        path = Path(path)
        file = path / "model.xml" if os.path.isdir(path) else path
        if not os.path.isfile(file):
            raise ExportError(f"{file} is missing; give a directory, an .xml or an .onnx file that was exported")
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        core = openvino_core()
        if os.path.isdir(path):
            _check_seal(path)
        try:
            model = core.read_model(_without_other_files(file))
            self._compiled = core.compile_model(model, "CPU", options)
            self._shape = self._compiled.input(0).get_partial_shape()
            self.batch: int | None = self._shape[0].get_length() if self._shape[0].is_static else None
            self._outputs = tuple(each.get_any_name() for each in self._compiled.outputs)
            said = model.rt_info["framework"] if model.has_rt_info(["framework"]) else {}
            self.metadata: dict[str, str] = {name: text.astype(str) for name, text in said.items()}
        except RuntimeError as error:
            raise ExportError(f"OpenVINO refuses {file}: {_said(error)}") from error

    def __call__(self, images: Tensor) -> Outputs:
        """The model's outputs for images, float32 on the CPU: a tensor, or several by name.

        Arguments:
            images: float32 (batch, channels, height, width), any batch, on any device.

        Raises:
            ExportError: the images have another dtype or size than the model takes.
        """
        expected = self._shape
        if images.dtype != torch.float32 or list(images.shape[1:]) != [int(str(size)) for size in list(expected)[1:]]:
            raise ExportError(
                f"the model takes float32 images {expected}; these are {images.dtype} {tuple(images.shape)}"
            )
        if not len(images):
            return mapped(lambda x: x[:0], self(images.new_zeros((1, *images.shape[1:]))))
        found = in_batches(self._run, images.detach().cpu(), self.batch or len(images))
        return given(dict(zip(self._outputs, found, strict=True)))

    def _run(self, images: Tensor) -> list[Tensor]:
        results = self._compiled([np.ascontiguousarray(images.numpy())])
        return [torch.from_numpy(results[place]) for place in range(len(self._outputs))]


def seal(directory: Path) -> None:
    """Write the digests of an exported directory's files beside them."""
    text = json.dumps({name: sha256(directory / name) for name in _FILES}, indent=1)
    (directory / _DIGEST).write_text(text + "\n", encoding="utf-8")


def _check_seal(directory: Path) -> None:
    file = directory / _DIGEST
    if not os.path.isfile(file):
        raise ExportError(
            f"{directory} does not say what was in it when it was exported; export it again, with --force"
        )
    try:
        said = parse_json(read_file(file, 10_000, ExportError), ExportError)
        check(said, Table(dict.fromkeys(_FILES, Text())), ExportError)
    except ExportError as error:
        raise ExportError(f"{file}: {error}") from None
    for name in _FILES:
        if not os.path.isfile(directory / name) or sha256(directory / name) != said[name]:
            raise ExportError(
                f"{directory / name} was altered since it was exported: its digest differs; export it again"
            )


def _without_other_files(file: Path) -> Path:
    """The file, after checking, if it is an ONNX model, that it is safe to read (see `read_onnx`)."""
    if file.suffix == ".onnx":
        try:
            read_onnx(file)
        except ExportError as error:
            raise ExportError(f"{file}: {error}") from error
    return file


def _said(error: Exception) -> str:
    """OpenVINO's message, without the source locations at its beginning."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if not line.startswith("Exception from")), type(error).__name__)


@functools.cache
def openvino_core() -> Any:
    """The `openvino.Core` of this process; there is only one, and it is never freed.

    Each of OpenVINO's CPU plug-ins (seen in 2026.4) installs an alternate signal stack for the thread, and restores the
    previous one when it is destroyed. Destroying two plug-ins in the order of their creation leaves the first one's
    stack installed although it is freed, and the next signal, such as the end of a data loader's worker, causes a
    segmentation fault.

    Raises:
        ExportError: the extra `openvino` is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise ExportError("OpenVINO models need openvino: pip install 'vitquant[openvino]'") from error
    return openvino.Core()

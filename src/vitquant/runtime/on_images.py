"""Programs, which are functions of codes, as functions of float images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitquant.errors import LoweringError
from vitquant.program.instructions import IntegerProgram
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.metadata import values_of
from vitquant.runtime.outputs import Outputs, given, named


@dataclass(frozen=True)
class InputQuantization:
    """The quantization of the images.

    Arguments:
        scale, zero_point: the real value of a code is (code - zero_point) * scale.
        low, high: the smallest and the largest code of an image.
    """

    scale: float
    zero_point: int
    low: int
    high: int

    def encode(self, images: Tensor) -> Tensor:
        """The codes of float32 images: int64; the rounding is that of `UniformQuantizer`."""
        scale = torch.tensor(self.scale, dtype=torch.float32, device=images.device)
        codes = torch.round(images.to(torch.float32) / scale) + self.zero_point
        return codes.clamp(self.low, self.high).to(torch.int64)


@dataclass(frozen=True)
class OutputQuantization:
    """The quantization of an output.

    Arguments:
        scales: one, or one for each index of the output's last axis.
        zero_point: the real value of a code is (code - zero_point) * scale.
    """

    scales: tuple[float, ...]
    zero_point: int

    def decode(self, codes: Tensor) -> Tensor:
        """The real values of codes: float32."""
        scales = torch.tensor(self.scales, dtype=torch.float32, device=codes.device)
        return (codes - self.zero_point) * scales


Quantization = tuple[InputQuantization, dict[str, OutputQuantization]]


def quantization_of(program: IntegerProgram) -> Quantization:
    """The quantization of a program's input, and that of its outputs by name.

    Raises:
        LoweringError: the program's facts lack it.
    """
    return _quantization(program.facts.get("input"), program.facts.get("outputs"), program.outputs)


def quantization_from(metadata: Mapping[str, str], names: Iterable[str]) -> Quantization:
    """The quantization of an ONNX model's input, and that of its outputs by name.

    Arguments:
        metadata: of the model.
        names: of its outputs, in their order.

    Raises:
        ExportError: the metadata is not valid.
        LoweringError: the metadata lacks the quantization.
    """
    return _quantization(values_of(metadata, "input"), values_of(metadata, "outputs"), names)


def _quantization(
    image: Mapping[str, Any] | None, outputs: Mapping[str, Any] | None, names: Iterable[str]
) -> Quantization:
    names = tuple(names)
    if not image or not outputs or not outputs.keys() >= set(names):
        raise LoweringError("the program does not say what its codes stand for; give and take codes yourself")
    said = {name: outputs[name] for name in names}
    ends = {name: OutputQuantization(tuple(each["scale"]), each["zero_point"]) for name, each in said.items()}
    return InputQuantization(**image), ends


class OnImages(nn.Module):
    """A function from float images to float outputs, made of a function on codes.

    Arguments:
        run: maps codes of images to codes of the program's outputs, a tensor or several by name.
        input, outputs: the quantization of these codes.
    """

    def __init__(
        self, run: Callable[[Tensor], Outputs], input: InputQuantization, outputs: Mapping[str, OutputQuantization]
    ) -> None:
        super().__init__()
        self.run, self.input, self.outputs = run, input, outputs

    def forward(self, images: Tensor) -> Outputs:
        """The program's outputs in float32 for float32 images (batch, channels, height, width)."""
        codes = named(self.run(self.input.encode(images)), self.outputs)
        return given({name: self.outputs[name].decode(each) for name, each in codes.items()})


def interpreted(program: IntegerProgram) -> OnImages:
    """A program as a function of images, by the reference interpreter."""
    quantization = quantization_of(program)
    return OnImages(Interpreter(program), *quantization)

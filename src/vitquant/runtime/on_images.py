"""Programs are functions of codes; here they are functions of images."""

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
    """What an image's codes stand for.

    Arguments:
        scale, zero_point: a code stands for (code - zero_point) * scale.
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
    """What the codes of an output stand for.

    Arguments:
        scales: one, or one for each index of its last axis.
        zero_point: a code stands for (code - zero_point) * scale.
    """

    scales: tuple[float, ...]
    zero_point: int

    def decode(self, codes: Tensor) -> Tensor:
        """The numbers that codes stand for: float32."""
        scales = torch.tensor(self.scales, dtype=torch.float32, device=codes.device)
        return (codes - self.zero_point) * scales


Quantization = tuple[InputQuantization, dict[str, OutputQuantization]]


def quantization_of(program: IntegerProgram) -> Quantization:
    """What the codes of a program's input stand for, and those of its outputs by name.

    Raises:
        LoweringError: the program does not say it.
    """
    return _quantization(program.facts.get("input"), program.facts.get("outputs"), program.outputs)


def quantization_from(metadata: Mapping[str, str], names: Iterable[str]) -> Quantization:
    """What the codes of an ONNX model's input and outputs stand for.

    Arguments:
        metadata: the model's.
        names: of its outputs, in their order.

    Raises:
        ExportError: its metadata is not what exports have.
        LoweringError: it does not say it.
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
    """A function of images, by whatever runs a program's codes.

    Arguments:
        run: codes of images to codes of what the program gives, a tensor or several by name.
        input, outputs: what these codes stand for.
    """

    def __init__(
        self, run: Callable[[Tensor], Outputs], input: InputQuantization, outputs: Mapping[str, OutputQuantization]
    ) -> None:
        super().__init__()
        self.run, self.input, self.outputs = run, input, outputs

    def forward(self, images: Tensor) -> Outputs:
        """What the program gives, in float32, for float32 images (batch, channels, height, width)."""
        codes = named(self.run(self.input.encode(images)), self.outputs)
        return given({name: self.outputs[name].decode(each) for name, each in codes.items()})


def interpreted(program: IntegerProgram) -> OnImages:
    """A program as a function of images, by the reference interpreter."""
    quantization = quantization_of(program)
    return OnImages(Interpreter(program), *quantization)

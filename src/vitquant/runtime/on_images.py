"""Programs are functions of codes; here they are functions of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitquant.errors import LoweringError
from vitquant.program.instructions import IntegerProgram
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.metadata import values_of


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
    """What the logits' codes stand for.

    Arguments:
        scales: one, or one for each class.
        zero_point: a code stands for (code - zero_point) * scale.
    """

    scales: tuple[float, ...]
    zero_point: int

    def decode(self, codes: Tensor) -> Tensor:
        """The logits that codes stand for: float32."""
        scales = torch.tensor(self.scales, dtype=torch.float32, device=codes.device)
        return (codes - self.zero_point) * scales


def quantization_of(program: IntegerProgram) -> tuple[InputQuantization, OutputQuantization]:
    """What the codes of a program's input and output stand for.

    Raises:
        LoweringError: the program does not say it.
    """
    return _quantization(program.facts.get("input"), program.facts.get("output"))


def quantization_from(metadata: Mapping[str, str]) -> tuple[InputQuantization, OutputQuantization]:
    """What the codes of an ONNX model's input and output stand for.

    Raises:
        ExportError: its metadata is not what exports have.
        LoweringError: it does not say it.
    """
    return _quantization(values_of(metadata, "input"), values_of(metadata, "output"))


def _quantization(
    image: Mapping[str, Any] | None, logits: Mapping[str, Any] | None
) -> tuple[InputQuantization, OutputQuantization]:
    if not image or not logits:
        raise LoweringError("the program does not say what its codes stand for; give and take codes yourself")
    return InputQuantization(**image), OutputQuantization(tuple(logits["scale"]), logits["zero_point"])


class OnImages(nn.Module):
    """Images to logits by whatever runs a program's codes.

    Arguments:
        run: codes of images to codes of logits.
        input, output: what these codes stand for.
    """

    def __init__(self, run: Callable[[Tensor], Any], input: InputQuantization, output: OutputQuantization) -> None:
        super().__init__()
        self.run, self.input, self.output = run, input, output

    def forward(self, images: Tensor) -> Tensor:
        """The logits, float32 (batch, classes), of float32 images (batch, channels, height, width)."""
        return self.output.decode(self.run(self.input.encode(images)))


def interpreted(program: IntegerProgram) -> OnImages:
    """A program as a function of images, by the reference interpreter."""
    quantization = quantization_of(program)
    return OnImages(Interpreter(program), *quantization)

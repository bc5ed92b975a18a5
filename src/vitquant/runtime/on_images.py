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
class Ends:
    """What an image's codes and the logits' codes stand for.

    Arguments:
        image_scale, image_zero: of the image's codes.
        low, high: the smallest and the largest of them.
        logit_scales: one, or one for each class.
        logit_zero: of the logits' codes.
    """

    image_scale: float
    image_zero: int
    low: int
    high: int
    logit_scales: tuple[float, ...]
    logit_zero: int

    @classmethod
    def of(cls, program: IntegerProgram) -> Ends:
        """The ends of a program.

        Raises:
            LoweringError: the program has none.
        """
        return cls._of(program.facts.get("input", {}), program.facts.get("output", {}))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Ends:
        """The ends of an ONNX model that takes codes.

        Raises:
            ExportError: they are not what ends are.
            LoweringError: there are none.
        """
        return cls._of(values_of(metadata, "input") or {}, values_of(metadata, "output") or {})

    @classmethod
    def _of(cls, image: Mapping[str, Any], logits: Mapping[str, Any]) -> Ends:
        if not image or not logits:
            raise LoweringError("the program does not say what its codes stand for; give and take codes yourself")
        codes = image["scale"], image["zero_point"], image["low"], image["high"]
        return cls(*codes, tuple(logits["scale"]), logits["zero_point"])

    def encode(self, images: Tensor) -> Tensor:
        """The codes of float32 images: int64; the rounding is that of `UniformQuantizer`."""
        scale = torch.tensor(self.image_scale, dtype=torch.float32, device=images.device)
        codes = torch.round(images.to(torch.float32) / scale) + self.image_zero
        return codes.clamp(self.low, self.high).to(torch.int64)

    def decode(self, codes: Tensor) -> Tensor:
        """The logits that codes stand for: float32."""
        scales = torch.tensor(self.logit_scales, dtype=torch.float32, device=codes.device)
        return (codes - self.logit_zero) * scales


class OnImages(nn.Module):
    """Images to logits by whatever runs a program's codes.

    Arguments:
        run: codes of images to codes of logits.
        ends: what they stand for.
    """

    def __init__(self, run: Callable[[Tensor], Any], ends: Ends) -> None:
        super().__init__()
        self.run, self.ends = run, ends

    def forward(self, images: Tensor) -> Tensor:
        """The logits, float32 (batch, classes), of float32 images (batch, channels, height, width)."""
        return self.ends.decode(self.run(self.ends.encode(images)))


def interpreted(program: IntegerProgram) -> OnImages:
    """A program as a function of images, by the reference interpreter."""
    ends = Ends.of(program)
    return OnImages(Interpreter(program), ends)

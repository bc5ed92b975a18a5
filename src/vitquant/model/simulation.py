"""The simulation without float32's rounding: what a quantized model means."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vitquant.model import QuantizedModel


class ExactSimulation(nn.Module):
    """A quantized model simulated in float64, on the codes that it has in float32.

    A deep quantized network multiplies its rounding: one code that flips in an early block flips others behind it, and
    a few blocks later most of the rounding noise is another draw. float32 rounds sums by up to 2**-24, which flips
    some codes of every image, so two float32 simulations of one model (another batch size, another number of threads)
    differ as much as two seeds. In float64 next to no code flips, and what differs from an integer program is the
    program.

    Arguments:
        model: calibrated; copied.

    Pitfall: twice the memory and half the speed of the float32 simulation; for comparisons, not for training.
    """

    def __init__(self, model: QuantizedModel) -> None:
        super().__init__()
        model.require_calibrated()
        self.model = copy.deepcopy(model)
        quantizers = self.model.quantizers
        # Images and weights get their codes in float32, as everywhere else: in float64 a few would round apart.
        with torch.no_grad():
            for value in self.model.values:
                if value.name in quantizers and value.parameter is not None:
                    weight = self.model.parameter(value)
                    weight.copy_(quantizers[value.name](weight))
        self.input = copy.deepcopy(model.image_quantizer)
        self.model.double()

    def forward(self, images: Tensor) -> Any:
        """What the model gives for float32 images (batch, channels, height, width), in float64."""
        if self.input is not None:
            images = self.input(images)
        return self.model(images.double())

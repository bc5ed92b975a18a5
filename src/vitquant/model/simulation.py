"""Simulation of a quantized model in float64, so that float32's rounding plays no part."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vitquant.model import QuantizedModel


class ExactSimulation(nn.Module):
    """A quantized model simulated in float64, with weights and images encoded in float32.

    A deep quantized network amplifies rounding: one code that flips in an early block flips others after it, and a few
    blocks later most of the rounding noise is a different draw. float32 rounds sums by up to 2**-24, which flips some
    codes of every image, so that two float32 simulations of one model (with another batch size or number of threads)
    differ as much as two seeds. In float64 hardly any code flips, so that a difference from an integer program is
    due to the program.

    Arguments:
        model: calibrated; copied.

    Pitfall: twice the memory and half the speed of the float32 simulation; for comparisons, not for training.
    """

    def __init__(self, model: QuantizedModel) -> None:
        super().__init__()
        model.require_calibrated()
        self.model = copy.deepcopy(model)
        quantizers = self.model.quantizers
        # Images and weights are encoded in float32, as everywhere else: in float64 a few would get other codes.
        with torch.no_grad():
            for value in self.model.values:
                if value.name in quantizers and value.parameter is not None:
                    weight = self.model.parameter(value)
                    weight.copy_(quantizers[value.name](weight))
        self.input = copy.deepcopy(model.image_quantizer)
        self.model.double()

    def forward(self, images: Tensor) -> Any:
        """The model's output in float64 for float32 images (batch, channels, height, width)."""
        if self.input is not None:
            images = self.input(images)
        return self.model(images.double())

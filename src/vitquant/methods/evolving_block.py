"""The numbers of one block that evolve, and the quantizers that they are put into."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitquant.errors import CalibrationError
from vitquant.methods.weight_correction import CorrectableLayer, apply_correction, correction, moments
from vitquant.quantizers import Quantizer
from vitquant.quantizers.parameters import SMALLEST_SCALE
from vitquant.search.genes import Genes
from vitquant.spec import Logarithmic, PowerOfTwoFactor, PowerOfTwoScale, QuantSpec

PARAMETERS = ("scale", "zero_point", "factor")


@dataclass(frozen=True)
class EvolvingLayer:
    """A layer whose quantized weight keeps its mean and variance whatever its scale.

    Arguments:
        layer: the layer.
        weight, bias: copies of its stored tensors.
        wanted: the mean and standard deviation of every channel of its quantized weight.
    """

    layer: CorrectableLayer
    weight: Tensor
    bias: Tensor | None
    wanted: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, layer: CorrectableLayer) -> EvolvingLayer:
        """The layer with the moments that its quantized weight has now."""
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return cls(layer, layer.weight.detach().clone(), bias, moments(layer.quantizer(layer.weight)))

    def correct(self) -> None:
        """Correct the layer for the scale that its quantizer has now, which is relative to the copied weight."""
        layer = self.layer
        layer.weight.copy_(self.weight)
        if layer.bias is not None and self.bias is not None:
            layer.bias.copy_(self.bias)
        apply_correction(layer, correction(layer.quantizer(layer.weight), self.wanted))


@dataclass(frozen=True)
class EvolvingBlock:
    """A block with parameters of quantizers that evolve.

    Arguments:
        quantizers: by the name of their value.
        parameters: those of `PARAMETERS` that evolve.
        layers: whose weights keep their mean and variance.
    """

    quantizers: Mapping[str, Quantizer]
    parameters: Sequence[str]
    layers: Sequence[EvolvingLayer] = ()

    @property
    def changing(self) -> tuple[str, ...]:
        """The names of the values whose quantizers change, and of the stored tensors that do."""
        return (*self.quantizers, *(name for each in self.layers for name in each.layer.stored))

    @property
    def current(self) -> Tensor:
        """The parameters of the quantizers, as `put` takes them: float64 (n,)."""
        return torch.cat([each.detach().cpu().double().flatten() for each in self._tensors().values()])

    def genes(self, mutation: float, wide_mutation: float, relative: bool) -> Genes:
        """The current parameters of the quantizers, and how far a mutation may move each.

        Zero points and factors are integers and move by one at most; scales of channels that are zero stay. The scales
        of one quantizer are one coordinate.

        Arguments:
            mutation, wide_mutation: how far a scale moves, of a quantizer with at most 4 bits and of one with more; an
                amount, or a share of the scale if `relative`.

        Raises:
            CalibrationError: a mutation could make a scale zero or negative.
        """
        widths = {name: quantizer.spec.bits for name, quantizer in self.quantizers.items()}
        parts = [self._of(key, mutation if widths[key[0]] <= 4 else wide_mutation, relative) for key in self._tensors()]
        sizes = torch.tensor([len(each[0]) for each in parts])
        coordinate = torch.arange(len(parts)).repeat_interleave(sizes)
        start, reach, shares, whole, low, high = (torch.cat(each) for each in zip(*parts, strict=True))
        return Genes(start, reach, shares, whole, low, high, coordinate)

    def put(self, genes: Tensor) -> None:
        """Set the parameters of the quantizers.

        Arguments:
            genes: float64 (n,), as in `genes`.
        """
        tensors = self._tensors()
        parts = genes.split([tensor.numel() for tensor in tensors.values()])
        for (name, parameter), part in zip(tensors, parts, strict=True):
            before: Tensor = getattr(self.quantizers[name], parameter)
            setattr(self.quantizers[name], parameter, part.view(before.shape).to(before))
        for layer in self.layers:
            layer.correct()

    def _tensors(self) -> dict[tuple[str, str], Tensor]:
        """The evolving tensors, by the name of their value and of the parameter."""
        return {
            (name, parameter): getattr(quantizer, parameter)
            for name, quantizer in self.quantizers.items()
            for parameter in self.parameters
            if evolves(quantizer.spec, parameter)
        }

    def _of(self, key: tuple[str, str], mutation: float, relative: bool) -> tuple[Tensor, ...]:
        name, parameter = key
        quantizer = self.quantizers[name]
        start = getattr(quantizer, parameter).detach().cpu().double().flatten()
        whole = parameter != "scale"
        low, high = _limits(quantizer, parameter)
        reach = torch.full_like(start, 1.0 if whole else mutation)
        if not whole:
            reach[start <= SMALLEST_SCALE] = 0.0
            unsafe = (start <= reach) & (reach > 0)
            if not relative and bool(unsafe.any()):
                smallest = start[unsafe].min().item()
                raise CalibrationError(
                    f"a scale is {smallest:.3g}, and a mutation by {mutation:g} could make it zero or negative: give a "
                    f"{'mutation' if quantizer.spec.bits <= 4 else 'wide_mutation'} below it, or relative = true",
                    name,
                )
        flags = (torch.full_like(start, relative and not whole).bool(), torch.full_like(start, whole).bool())
        return start, reach, *flags, torch.full_like(start, low), torch.full_like(start, high)


def evolves(spec: QuantSpec, parameter: str) -> bool:
    """Whether a parameter of a quantizer can be changed by itself: one of `PARAMETERS`."""
    if parameter == "factor":
        return isinstance(spec.scheme, PowerOfTwoFactor)
    free = not isinstance(spec.scheme, PowerOfTwoScale | Logarithmic)
    return free if parameter == "scale" else not (spec.symmetric or isinstance(spec.scheme, Logarithmic))


def _limits(quantizer: Quantizer, parameter: str) -> tuple[float, float]:
    spec = quantizer.spec
    if parameter == "scale":
        return SMALLEST_SCALE, math.inf
    if parameter == "zero_point":
        return spec.qmin, spec.qmax
    assert isinstance(spec.scheme, PowerOfTwoFactor)
    return 0, spec.scheme.factors - 1

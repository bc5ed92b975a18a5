"""Weight correction: give every channel of a quantized weight the mean and the variance that it has in float."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vitquant.errors import CalibrationError
from vitquant.graph.operators import aten, calls
from vitquant.graph.segments import IMAGES, Segment
from vitquant.graph.sites import Site
from vitquant.graph.stored import stored, times_read, unquantized
from vitquant.methods.context import Context
from vitquant.methods.searched_layer import LAYERS, OF_CONV, node_of, option
from vitquant.model import QuantizedModel, Record
from vitquant.quantizers import Quantizer
from vitquant.quantizers.parameters import SMALLEST_SCALE
from vitquant.spec import PerAxis, Uniform

_AT_ONCE = 2  # images: the inputs of all layers are in memory together


@dataclass(frozen=True)
class CorrectWeightsSettings:
    """Weight correction has no settings: it corrects every weight that has a scale for each output channel."""


@dataclass(frozen=True)
class Correction:
    """The affine map of a channel's quantized weights after which they have a given mean and variance.

    Arguments:
        ratio: float64 (channels,), by which they are multiplied.
        shift: float64 (channels,), which is then added.
    """

    ratio: Tensor
    shift: Tensor


@dataclass(frozen=True)
class CorrectableLayer:
    """A layer whose weight can be corrected.

    Arguments:
        name: of the weight's value.
        stored: the names of its stored tensors that may change.
        quantizer: of the weight.
        weight: as stored, outputs first; nothing else reads it.
        bias: as stored, (outputs,); None if there is none that may change.
        input_sum: float64 (outputs,), the mean over calibration images and tokens of the sum of what an output unit
            reads: what a shift of all its weights by one adds to its mean.
    """

    name: str
    stored: tuple[str, ...]
    quantizer: Quantizer
    weight: Tensor
    bias: Tensor | None
    input_sum: Tensor


def correct_weights(model: QuantizedModel, context: Context, settings: CorrectWeightsSettings) -> Record:
    """Give every output channel of the quantized weights the mean and the variance of its float weights.

    The variance is corrected by the scale. The mean would need a shift of every weight of a channel, which no code
    expresses; what the shift adds to the channel's output on average is added to its bias instead. All weights stay on
    their grids. It takes one float forward pass over the data; memory does not grow with it.

    Arguments:
        model: calibrated, its operations still in float; scales, stored weights and biases change.
        context: its data are iterated over once.
        settings: none.

    Raises:
        CalibrationError: no data.

    Source: Banner et al. 2019, "Post training 4-bit quantization of convolutional networks", section 4; Evol-Q's code
    has it as `--bias-corr`, with the shift in the weights. docs/evol-q.md.

    Pitfall: a stored weight is multiplied like its scale, so that it keeps its codes: `run(quantized=False)` has
        weights of another variance.
    """
    model.require_calibrated()
    sites = [site for site in model.sites if site.kind in LAYERS]
    reasons = {str(site.reader("weight")): reason for site in sites if (reason := why_not_correctable(model, site))}
    chosen = [site for site in sites if not why_not_correctable(model, site)]
    read = model.segment(IMAGES, [str(site.reader("input")) for site in chosen], quantized=False) if chosen else None
    layers = correctable_layers(model, chosen, read, context.data)
    decisions: dict[str, dict[str, Any]] = {name: {"as calibrated, because": why} for name, why in reasons.items()}
    with torch.no_grad():
        for layer in layers:
            wanted = moments(layer.weight)
            found = correction(layer.quantizer(layer.weight), wanted)
            apply_correction(layer, found)
            ratio = found.ratio
            decisions[layer.name] = {
                "ratio, smallest": ratio.min().item(),
                "ratio, largest": ratio.max().item(),
                "shift": "in the bias" if layer.bias is not None else "left out, the layer has no bias of its own",
            }
    return Record("correct-weights", {"weights": len(layers)}, decisions)


def moments(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation of every output channel of a weight: float64 (channels,) each."""
    rows = weight.detach().flatten(1).double()
    return rows.mean(1), rows.std(1, correction=0)


def correction(quantized: Tensor, wanted: tuple[Tensor, Tensor]) -> Correction:
    """The correction of quantized weights to a mean and a standard deviation.

    A channel whose quantized weights are all equal is not multiplied.

    Arguments:
        quantized: (channels, ...).
        wanted: as `moments` gives them.
    """
    mean, deviation = moments(quantized)
    ratio = torch.where(deviation > 0, wanted[1] / deviation.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
    ratio = torch.where(ratio > 0, ratio, 1.0)
    return Correction(ratio, wanted[0] - ratio * mean)


def apply_correction(layer: CorrectableLayer, found: Correction) -> None:
    """Multiply the scale and the stored weight of a layer, and add the mean effect of the shift to its bias.

    Where rounding would give a weight another code, it becomes the value of the code that it had.
    """
    codes = layer.quantizer.encode(layer.weight)
    scale = (layer.quantizer.scale.double() * found.ratio).float().clamp(min=SMALLEST_SCALE)
    layer.quantizer.scale = scale
    ratio = found.ratio.to(layer.weight.dtype).view(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight.mul_(ratio)
    kept = layer.quantizer.encode(layer.weight) == codes
    layer.weight.copy_(torch.where(kept, layer.weight, layer.quantizer.decode(codes, layer.weight.dtype)))
    if layer.bias is not None:
        layer.bias.add_((found.shift * layer.input_sum).to(layer.bias.dtype))


def why_not_correctable(model: QuantizedModel, site: Site) -> str:
    """Why the weight of a layer cannot be corrected; empty when it can."""
    value = model.index.read_by(site)["weight"]
    spec = model.assignments[value.name].spec
    if spec is None:
        return "it is in float"
    if not isinstance(spec.scheme, Uniform) or spec.granularity != PerAxis(0):
        return "its output channels do not each have a uniform scale"
    if value.parameter is None or value.node != site.operands["weight"]:
        return "it is computed or rearranged"
    if times_read(model.graph_module)[id(model.parameter(value))] > 1:
        return "several operations read it"
    node = node_of(model, site)
    if site.kind == "conv" and (not calls(node, {aten.conv2d}) or isinstance(option(node, 4, "padding", 0), str)):
        return "its layer is no plain two-dimensional convolution"
    return ""


def correctable_layers(
    model: QuantizedModel, sites: Sequence[Site], read: Segment | None, data: Iterable[Tensor]
) -> tuple[CorrectableLayer, ...]:
    """Layers with the mean sums of their inputs in the float model; one float forward pass over the data.

    Arguments:
        sites: for which `why_not_correctable` has no reason.
        read: the segment of the float model from the images to the inputs of these sites; None for no sites.
        data: batches of images.

    Raises:
        CalibrationError: no data.
    """
    if read is None:
        return ()
    sums: dict[str, Tensor] = {}
    rows = dict.fromkeys((site.name for site in sites), 0)
    with torch.inference_mode():
        for images in (part for batch in data for part in batch.split(_AT_ONCE)):
            for site, x in zip(sites, read(images), strict=True):
                found = _input_sums(model, site, x)
                sums[site.name] = sums.get(site.name, 0.0) + found.sum(0)
                rows[site.name] += len(found)
    if not sums:
        raise CalibrationError("no calibration images: give at least one batch")
    module, quantizers = model.graph_module, model.quantizers
    layers: list[CorrectableLayer] = []
    for site in sites:
        value = model.index.read_by(site)["weight"]
        weight = model.parameter(value)
        read_bias = option(node_of(model, site), 2, "bias", None)
        bias = stored(module, read_bias)
        if bias is not None and times_read(module)[id(bias)] > 1:
            bias = None
        names = (str(value.parameter), *(() if bias is None else (str(unquantized(read_bias).target),)))
        mean = (sums[site.name] / rows[site.name]).clone()  # a clone is no inference tensor
        mean = mean.repeat_interleave(len(weight) // len(mean))
        layers.append(CorrectableLayer(value.name, names, quantizers[value.name], weight, bias, mean))
    return tuple(layers)


def _input_sums(model: QuantizedModel, site: Site, x: Tensor) -> Tensor:
    """The sum of all numbers that an output unit reads: float64 (rows, groups), rows are tokens or places."""
    if site.kind == "linear":
        return x.flatten(0, -2).sum(1, keepdim=True, dtype=torch.float64)
    node, weight = node_of(model, site), model.parameter(model.index.read_by(site)["weight"])
    groups = option(node, 6, "groups", 1)
    stride, padding, dilation = (option(node, place, name, default) for place, name, default in OF_CONV)
    ones = torch.ones(groups, *weight.shape[1:], dtype=torch.float64, device=x.device)
    return functional.conv2d(x.double(), ones, None, stride, padding, dilation, groups).movedim(1, -1).flatten(0, -2)

"""Weights, biases and scales moved by gradients, until the quantized model's output is the float model's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitquant.errors import CalibrationError, RecipeError, first_line
from vitquant.model import QuantizedModel, Record
from vitquant.objectives.output_error import output_error
from vitquant.progress import Progress, silent
from vitquant.quantizers import Quantizer
from vitquant.quantizers.parameters import SMALLEST_SCALE
from vitquant.spec import PowerOfTwoScale


@dataclass(frozen=True)
class ReconstructOutputSettings:
    """How long, and how far in a step.

    Arguments:
        passes: how often the calibration images are gone through; each batch is a step.
        weights, vectors, scales: what a step changes at first, about: of tensors of two and more axes, of biases and
            norms, and of the logarithms of activations' scales. It falls to 0 along a cosine.
        images_at_once: how many images are in memory with all that their gradients need; results differ by rounding.

    Raises:
        RecipeError: a number without meaning.
    """

    passes: int = 8
    weights: float = 2e-5
    vectors: float = 1e-4
    scales: float = 1e-3
    images_at_once: int = 8

    def __post_init__(self) -> None:
        for name in ("passes", "images_at_once"):
            if not isinstance(getattr(self, name), int) or not 1 <= getattr(self, name) <= 1_000_000:
                raise RecipeError(
                    f"reconstruct-output: {name} = {getattr(self, name)}: it is a whole number from 1 to 1,000,000"
                )
        for name in ("weights", "vectors", "scales"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"reconstruct-output: {name} = {getattr(self, name)}: it is at least 0 and below 1")


def reconstruct_output(
    model: QuantizedModel,
    data: Iterable[Tensor],
    settings: ReconstructOutputSettings,
    progress: Progress = silent,
) -> Record:
    """Make the quantized model's output the float model's, by gradients through its quantizers.

    Weights, biases, norms and the scales of activations change; scales of weights and all zero points stay. Labels are
    not used. One float forward pass over the data, then `passes` times a forward and a backward pass.

    Arguments:
        model: calibrated, its operations still in float.
        data: the calibration batches again, each of them a step of Adam.
        settings: see there.
        progress: told how many of the steps are done.

    Returns:
        The mean output error of the first and of the last pass over the data.

    Raises:
        CalibrationError: no data, operations are computed on codes already, torch has no gradients of the model, or
            the error is no number.

    Source: the global form of reconstruction, such as GLF-Q's loss of the penultimate feature; straight-through
    gradients, and LSQ's for scales (Esser et al. 2020, equation 3). docs/output-reconstruction.md.

    Pitfall: the model is no longer the float model with quantizers in it: `run(quantized=False)` has other weights.
    """
    model.require_calibrated()
    if model.arithmetic is not None:
        raise CalibrationError(
            "operations are on codes already: reconstruct-output comes before integer-operations; "
            "change the recipe's order"
        )
    if any(each.is_inference() for each in model.graph_module.parameters()):
        raise CalibrationError("a model of torch.inference_mode() has no gradients: quantize it outside of that")
    expected = _float_outputs(model, data)
    if not expected:
        raise CalibrationError("no calibration images: give at least one batch")
    total = settings.passes * len(expected)
    errors: list[float] = []
    with torch.inference_mode(False), torch.enable_grad(), _learnable(model) as learned:
        optimizer = torch.optim.Adam(
            [
                {"params": learned.weights, "lr": settings.weights},
                {"params": learned.vectors, "lr": settings.vectors},
                {"params": [scale.logarithm for scale in learned.scales], "lr": settings.scales},
            ]
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, total))
        for _ in range(settings.passes):
            for batch, outputs in zip(data, expected, strict=True):
                progress("reconstructing the output", len(errors), total)
                optimizer.zero_grad()
                errors.append(_accumulate(model, batch, outputs, learned.scales, settings.images_at_once))
                if not math.isfinite(errors[-1]):
                    raise CalibrationError(
                        f"the output error is {errors[-1]} in step {len(errors)} of {total}: "
                        "lower weights, vectors and scales of reconstruct-output"
                    )
                optimizer.step()
                schedule.step()
    progress("reconstructing the output", total, total)
    summary = {
        "images": sum(len(outputs) for outputs in expected),
        "steps": total,
        "output error, first pass": sum(errors[: len(expected)]) / len(expected),
        "output error, last pass": sum(errors[-len(expected) :]) / len(expected),
    }
    return Record("reconstruct-output", summary)


@dataclass(frozen=True)
class _Scale:
    """A scale as a multiple of what was calibrated, by the logarithm of that, so that it stays positive."""

    quantizer: Quantizer
    calibrated: Tensor
    logarithm: nn.Parameter

    @classmethod
    def of(cls, quantizer: Quantizer) -> _Scale:
        return cls(quantizer, quantizer.scale, nn.Parameter(torch.zeros_like(quantizer.scale)))

    def put(self) -> None:
        """Give the quantizer what the logarithm says now."""
        self.quantizer.scale = (self.calibrated * self.logarithm.exp()).clamp(min=SMALLEST_SCALE)

    def harden(self) -> None:
        """Leave the quantizer with numbers that nothing learns any more."""
        with torch.no_grad():
            self.put()


@dataclass(frozen=True)
class _Learned:
    """What gradients change: stored tensors of two and more axes, of one, and scales."""

    weights: list[nn.Parameter]
    vectors: list[nn.Parameter]
    scales: list[_Scale]


@contextmanager
def _learnable(model: QuantizedModel) -> Iterator[_Learned]:
    """Everything that is learned, with gradients while this lasts."""
    parameters = [each for each in model.graph_module.parameters() if each.is_floating_point()]
    asked = [each.requires_grad for each in parameters]
    scales = [_Scale.of(quantizer) for name, quantizer in model.quantizers.items() if _is_learned(model, name)]
    try:
        for each in parameters:
            each.requires_grad_(True)
        yield _Learned([p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2], scales)
    finally:
        for each, before in zip(parameters, asked, strict=True):
            each.requires_grad_(before)
            each.grad = None
        for scale in scales:
            scale.harden()


def _is_learned(model: QuantizedModel, name: str) -> bool:
    """Whether it is an activation's, and any positive number is a scale there."""
    value = model.value(name)
    spec = model.assignments[value.name].spec
    return spec is not None and value.parameter is None and not isinstance(spec.scheme, PowerOfTwoScale)


def _float_outputs(model: QuantizedModel, data: Iterable[Tensor]) -> list[Tensor]:
    """What the float model gives, batch by batch."""
    with torch.inference_mode(False), torch.no_grad():
        return [_output(model, batch.clone(), quantized=False).clone() for batch in data]


def _accumulate(
    model: QuantizedModel, batch: Tensor, expected: Tensor, scales: Iterable[_Scale], at_once: int
) -> float:
    """Add up the gradients of a batch's mean error, some images at a time; the error.

    The batch may be of torch.inference_mode(), which backward passes refuse; its copy is not.
    """
    total = 0.0
    for images, outputs in zip(batch.clone().split(at_once), expected.split(at_once), strict=True):
        for scale in scales:  # a graph of its own for every backward pass
            scale.put()
        error = output_error(_output(model, images, quantized=True), outputs).sum() / len(batch)
        try:
            error.backward()
        except RuntimeError as refused:
            raise CalibrationError(
                f"torch computes no gradients of this model: {first_line(refused)}; leave reconstruct-output out of "
                "the recipe, or, where memory is the reason, lower its images_at_once"
            ) from refused
        total += error.item()
    return total


def _output(model: QuantizedModel, images: Tensor, quantized: bool) -> Tensor:
    """The tensor that the model's output is, or its logits."""
    node = next(site.operands["input"] for site in model.sites if site.kind == "output")
    held: list[Tensor] = []
    model.run(images, {}, quantized=quantized, nodes=[(model.read_as(node), held.append)])
    return held[0]


def _cosine(step: int, total: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / total))

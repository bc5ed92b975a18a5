"""Training of a quantized model towards its float model, by gradients through its quantizers and without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitquant.errors import CalibrationError, first_line
from vitquant.graph.kinds import kinds_that
from vitquant.graph.segments import IMAGES, Segment
from vitquant.methods.context import Context
from vitquant.model import QuantizedModel
from vitquant.objectives.relative_error import relative_error
from vitquant.quantizers.learnable import LearnedScale
from vitquant.spec import PowerOfTwoScale
from vitquant.work import Saved

_NORMS = kinds_that(of_tokens=True)


class Rates(NamedTuple):
    """Adam's learning rates at the first step.

    Arguments:
        weights: of quantized weights, in steps of their quantizers.
        others: of biases, norms and embeddings, in their own units.
        scales: of the logarithms of activations' scales.
    """

    weights: float
    others: float
    scales: float


@dataclass(frozen=True)
class Student:
    """A quantized model whose weights, biases and scales are learned, and the float model that it learns from.

    Use `learning` to create one. Quantized weights, biases, norms, embeddings and the scales of activations change;
    weights in float, scales of weights and all zero points stay.

    Arguments:
        model: the quantized model.
        student, teacher: their outputs, then those of their LayerNorms and RMSNorms.
        errors: of each output, see `Context.output_errors`.
        norms: the weight of the error of the norms beside that of the outputs.
        scales: the scales that are learned.
        optimizer: of the parameters and the scales.
        rates: the learning rate of each of its groups at the first step.
    """

    model: QuantizedModel
    student: Segment
    teacher: Segment
    errors: Sequence[Callable[[Tensor, Tensor], Tensor]]
    norms: float
    scales: list[LearnedScale]
    optimizer: torch.optim.Adam
    rates: list[float]

    @classmethod
    @contextmanager
    def learning(cls, model: QuantizedModel, context: Context, rates: Rates, norms: float) -> Generator[Student]:
        """The student of a model; its parameters require gradients inside the context, scales are plain after it.

        Arguments:
            model: calibrated, its operations still in float.
            context: its teacher and its errors are used.
            rates: the learning rates at the first step.
            norms: the weight of the norms' error.
        """
        assert context.teacher is not None
        outputs = [site.name for site in model.sites if site.kind == "output"]
        ends = outputs + [site.name for site in model.sites if site.kind in _NORMS]
        with torch.inference_mode(False), torch.enable_grad(), _learnable(model) as learned:
            groups = [
                *({"params": [weight], "lr": rates.weights * step} for weight, step in learned.weights),
                {"params": learned.others, "lr": rates.others},
                {"params": [scale.logarithm for scale in learned.scales], "lr": rates.scales},
            ]
            optimizer = torch.optim.Adam(groups)
            yield cls(
                model,
                model.segment(IMAGES, ends),
                context.teacher.segment(IMAGES, ends),
                context.output_errors or [relative_error] * len(outputs),
                norms,
                learned.scales,
                optimizer,
                [group["lr"] for group in optimizer.param_groups],
            )

    def losses(self, images: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """The mean error of the outputs, and what is minimized: with it that of the norms.

        Arguments:
            images: of the step, (images, channels, height, width).
            share: of the learning rates at the first step, which the next `step` takes.
        """
        for scale in self.scales:
            scale.put()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        with torch.no_grad():
            expected = self.teacher(images)
        found = self.student(images)
        pairs = list(zip(found, expected, strict=True))
        output = torch.stack([error(*pair).mean() for error, pair in zip(self.errors, pairs, strict=False)]).mean()
        norms = [relative_error(*pair).mean() for pair in pairs[len(self.errors) :]]
        return output, output + self.norms * (torch.stack(norms).mean() if norms else torch.zeros_like(output))

    def step(self, loss: Tensor) -> None:
        """One step of Adam.

        Raises:
            CalibrationError: torch cannot differentiate the model.
        """
        self.optimizer.zero_grad()
        try:
            loss.backward()
        except RuntimeError as refused:
            raise CalibrationError(
                f"torch computes no gradients of this model: {first_line(refused)}; leave the method out of the "
                "recipe, or, where memory is the reason, lower its batch"
            ) from refused
        self.optimizer.step()

    def harden(self) -> None:
        """Make the scales plain numbers, until the next `losses`."""
        for scale in self.scales:
            scale.harden()

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, but for the share of the learning rates."""
        tensors: dict[str, Tensor] = {
            f"model/{name}": each for name, each in self.model.graph_module.named_parameters()
        }
        tensors |= {f"scale/{number}": scale.logarithm for number, scale in enumerate(self.scales)}
        for number, parameter in enumerate(self._parameters()):
            state: Mapping[str, Tensor] = self.optimizer.state.get(parameter, {})
            tensors |= {f"adam/{number}/{key}": torch.as_tensor(each) for key, each in state.items()}
        return tensors

    def put_state(self, saved: Saved) -> None:
        """Continue from what `state` gave.

        Raises:
            CheckpointError: it is damaged, or is not of this model.
        """
        with torch.no_grad():
            for name, parameter in self.model.graph_module.named_parameters():
                parameter.copy_(saved.tensor(f"model/{name}", parameter))
            for number, scale in enumerate(self.scales):
                scale.logarithm.copy_(saved.tensor(f"scale/{number}", scale.logarithm))
        for number, parameter in enumerate(self._parameters()):
            if state := saved.adam(f"adam/{number}", parameter):
                self.optimizer.state[parameter] = state

    def _parameters(self) -> Iterator[Tensor]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])


def cosine_decay(step: int, total: int) -> float:
    """The share of the initial learning rate at a step: from 1 to 0 along a cosine."""
    return 0.5 * (1 + math.cos(math.pi * step / total))


@dataclass(frozen=True)
class _Learned:
    """The learned parameters: weights, each with the step of its quantizer, all other parameters, and scales."""

    weights: list[tuple[nn.Parameter, float]]
    others: list[nn.Parameter]
    scales: list[LearnedScale]


@contextmanager
def _learnable(model: QuantizedModel) -> Generator[_Learned]:
    """The learned parameters, which require gradients inside the context; scales are plain numbers after it."""
    parameters = [each for each in model.graph_module.parameters() if each.is_floating_point()]
    asked = [each.requires_grad for each in parameters]
    scales = [LearnedScale.of(quantizer) for name, quantizer in model.quantizers.items() if _is_learned(model, name)]
    try:
        for each in parameters:
            each.requires_grad_(True)
        steps = _weight_steps(model)
        weights = [(each, steps[each]) for each in parameters if each in steps]
        yield _Learned(weights, [each for each in parameters if each not in steps], scales)
    finally:
        for each, before in zip(parameters, asked, strict=True):
            each.requires_grad_(before)
            each.grad = None
        for scale in scales:
            scale.harden()


def _weight_steps(model: QuantizedModel) -> dict[nn.Parameter, float]:
    """The quantization step of each weight of a product, the mean over its channels; 0 for a weight in float."""
    steps = {name: quantizer.step.mean().item() for name, quantizer in model.quantizers.items()}
    return {
        model.graph_module.get_parameter(value.parameter): steps.get(value.name, 0.0)
        for value in model.values
        if value.parameter is not None and any(reader.operand == "weight" for reader in value.readers)
    }


def _is_learned(model: QuantizedModel, name: str) -> bool:
    """Whether the scale of a value's quantizer is learned: that of an activation which may be any positive number."""
    value = model.index.value(name)
    spec = model.assignments[value.name].spec
    return spec is not None and value.parameter is None and not isinstance(spec.scheme, PowerOfTwoScale)

"""Output reconstruction: learn weights, biases and scales so that the quantized output approaches the float one."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from vitquant.errors import CalibrationError, RecipeError, first_line
from vitquant.graph.kinds import kinds_that
from vitquant.graph.segments import IMAGES, Segment
from vitquant.methods.context import Context
from vitquant.model import QuantizedModel, Record
from vitquant.objectives.relative_error import relative_error
from vitquant.quantizers.learnable import LearnedScale
from vitquant.schema import ListOf, Number
from vitquant.spec import PowerOfTwoScale
from vitquant.work import WorkState

_NORMS = kinds_that(of_tokens=True)


@dataclass(frozen=True)
class ReconstructOutputSettings:
    """The length of the training and its learning rates.

    Arguments:
        passes: how many times to iterate over the calibration images.
        batch: the number of images in a step, which are in memory with all activations that their gradients need.
        weights: Adam's initial learning rate of quantized weights, in steps of their quantizers. All rates decay to 0
            along a cosine.
        others: the initial learning rate of biases, norms and embeddings, in their own units.
        scales: the initial learning rate of the logarithms of activations' scales.
        norms: the weight of the error of the LayerNorms' and RMSNorms' outputs beside that of the model's output.

    Raises:
        RecipeError: a number out of range.
    """

    passes: int = 4
    batch: int = 8
    weights: float = 2e-3
    others: float = 2e-4
    scales: float = 2e-3
    norms: float = 1.0

    def __post_init__(self) -> None:
        for name in ("passes", "batch"):
            if not isinstance(getattr(self, name), int) or not 1 <= getattr(self, name) <= 1_000_000:
                raise RecipeError(
                    f"reconstruct-output: {name} = {getattr(self, name)}: it is a whole number from 1 to 1,000,000"
                )
        for name, below in (("weights", 1), ("others", 1), ("scales", 1), ("norms", math.inf)):
            if not 0 <= getattr(self, name) < below:
                raise RecipeError(
                    f"reconstruct-output: {name} = {getattr(self, name)}: it is at least 0 and below {below}"
                )


def reconstruct_output(model: QuantizedModel, context: Context, settings: ReconstructOutputSettings) -> Record:
    """Bring the quantized model's output close to the float model's, by gradients through its quantizers.

    Quantized weights, biases, norms, embeddings and the scales of activations change; weights in float, scales of
    weights and all zero points stay. Labels are not used. It takes `passes` times a float forward pass, a forward pass
    and a backward pass over the data; memory does not grow with the amount of data.

    Arguments:
        model: calibrated, its operations still in float.
        context: its data are iterated over `passes` times; its teacher is used. After an interruption, a later call
            with the same work state continues; at the deadline it ends with what is learned so far.
        settings: see `ReconstructOutputSettings`.

    Returns:
        The mean output error of the first and of the last pass over the data.

    Raises:
        CalibrationError: no data, torch cannot differentiate the model, or the error becomes NaN or infinite.

    Source: the global form of reconstruction, such as GLF-Q's loss of the penultimate feature beside a block's own;
    straight-through gradients, and LSQ's for scales (Esser et al. 2020, equation 3). docs/output-reconstruction.md.

    Pitfall: the model is no longer the float model with quantizers in it: `run(quantized=False)` has other weights.
    """
    model.require_calibrated()
    assert context.teacher is not None
    sizes = [len(batch) for batch in context.data]
    if not sizes:
        raise CalibrationError("no calibration images: give at least one batch")
    in_a_pass = sum(math.ceil(size / settings.batch) for size in sizes)
    total = settings.passes * in_a_pass
    outputs = [site.name for site in model.sites if site.kind == "output"]
    errors = context.output_errors or [relative_error] * len(outputs)
    ends = outputs + [site.name for site in model.sites if site.kind in _NORMS]
    student, teacher = model.segment(IMAGES, ends), context.teacher.segment(IMAGES, ends)
    with torch.inference_mode(False), torch.enable_grad(), _learnable(model) as learned:
        training = _Training.begun(model, learned, settings)
        training.resume(context.work, total)
        for images in islice(_steps(context.data, settings), training.step, None):
            if context.out_of_time:
                training.save(context.work)
                break
            context.progress("reconstructing the output", training.step, total)
            training.put(_cosine(training.step, total))
            output, norms = _errors(student, teacher, images, errors)
            error = output + settings.norms * norms
            if not math.isfinite(error.item()):
                raise CalibrationError(
                    f"the output error is {output.item()} in step {training.step + 1} of {total}: "
                    "lower weights, others and scales of reconstruct-output"
                )
            training.optimizer.zero_grad()
            _backward(error)
            training.optimizer.step()
            training.errors.append(output.item())
            if context.work.due:
                training.save(context.work)
    if training.step != total and not context.out_of_time:
        raise CalibrationError("the images cannot be gone through again: give a list of batches or a DataLoader")
    context.progress("reconstructing the output", training.step, total)
    errors = training.errors
    summary = {"images": sum(sizes), "steps": training.step, "of": total}
    if errors:
        first, last = errors[:in_a_pass], errors[-in_a_pass:]
        summary |= {
            "output error, first pass": sum(first) / len(first),
            "output error, last pass": sum(last) / len(last),
        }
    return Record("reconstruct-output", summary)


_ERRORS = ListOf(Number(0.0, 1e30), most=2**24)


@dataclass(frozen=True)
class _Training:
    """The state of the training: everything that the next step of Adam depends on.

    Arguments:
        model: the model whose parameters are learned.
        scales: the scales that are learned.
        optimizer: of the parameters and the scales.
        rates: the learning rate of each of its groups at the first step.
        errors: the output error of every step so far.
    """

    model: QuantizedModel
    scales: list[LearnedScale]
    optimizer: torch.optim.Adam
    rates: list[float]
    errors: list[float]

    @classmethod
    def begun(cls, model: QuantizedModel, learned: _Learned, settings: ReconstructOutputSettings) -> _Training:
        """The state before the first step."""
        groups = [
            *({"params": [weight], "lr": settings.weights * step} for weight, step in learned.weights),
            {"params": learned.others, "lr": settings.others},
            {"params": [scale.logarithm for scale in learned.scales], "lr": settings.scales},
        ]
        optimizer = torch.optim.Adam(groups)
        return cls(model, learned.scales, optimizer, [group["lr"] for group in optimizer.param_groups], [])

    @property
    def step(self) -> int:
        """The number of steps done so far."""
        return len(self.errors)

    def put(self, share: float) -> None:
        """Set the quantizers' scales in a new autograd graph, and the learning rates to `share` of the initial ones."""
        for scale in self.scales:
            scale.put()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share

    def save(self, work: WorkState) -> None:
        """Save everything that the next step depends on."""
        tensors = {f"model/{name}": each for name, each in self.model.graph_module.named_parameters()}
        tensors |= {f"scale/{number}": scale.logarithm for number, scale in enumerate(self.scales)}
        for number, parameter in enumerate(self._parameters()):
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"adam/{number}/{key}": torch.as_tensor(each) for key, each in state.items()}
        work.save(tensors, self.errors)

    def resume(self, work: WorkState, total: int) -> None:
        """Continue from the state that a killed run saved, if there is one.

        Arguments:
            work: the saved state.
            total: the number of steps in all.

        Raises:
            CheckpointError: the state is damaged, or is not of this model.
        """
        saved = work.load(_ERRORS)
        if saved is None:
            return
        if len(saved.values) > total:
            raise saved.damaged()
        with torch.no_grad():
            for name, parameter in self.model.graph_module.named_parameters():
                parameter.copy_(saved.tensor(f"model/{name}", parameter))
            for number, scale in enumerate(self.scales):
                scale.logarithm.copy_(saved.tensor(f"scale/{number}", scale.logarithm))
        for number, parameter in enumerate(self._parameters()):
            if f"adam/{number}/step" in saved.tensors:  # Adam has no state for parameters without gradient
                step, like = torch.zeros(()), parameter.detach()
                self.optimizer.state[parameter] = {
                    "step": saved.tensor(f"adam/{number}/step", step),
                    **{key: saved.tensor(f"adam/{number}/{key}", like) for key in ("exp_avg", "exp_avg_sq")},
                }
        self.errors.extend(saved.values)

    def _parameters(self) -> Iterator[Tensor]:
        return (parameter for group in self.optimizer.param_groups for parameter in group["params"])


def _steps(data: Iterable[Tensor], settings: ReconstructOutputSettings) -> Iterator[Tensor]:
    """The images of every step.

    A batch is copied, since it may be an inference tensor, which autograd cannot save for backward.
    """
    for _ in range(settings.passes):
        for batch in data:
            yield from batch.clone().split(settings.batch)


def _errors(
    student: Segment, teacher: Segment, images: Tensor, errors: Sequence[Callable[[Tensor, Tensor], Tensor]]
) -> tuple[Tensor, Tensor]:
    """The mean error of the outputs, the first tensors of both segments, and that of the norms, which are the rest."""
    with torch.no_grad():
        expected = teacher(images)
    found = student(images)
    pairs = list(zip(found, expected, strict=True))
    output = torch.stack([error(*pair).mean() for error, pair in zip(errors, pairs, strict=False)]).mean()
    norms = [relative_error(*pair).mean() for pair in pairs[len(errors) :]]
    return output, torch.stack(norms).mean() if norms else torch.zeros_like(output)


def _backward(error: Tensor) -> None:
    try:
        error.backward()
    except RuntimeError as refused:
        raise CalibrationError(
            f"torch computes no gradients of this model: {first_line(refused)}; leave reconstruct-output out of "
            "the recipe, or, where memory is the reason, lower its batch"
        ) from refused


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


def _cosine(step: int, total: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / total))

"""Output reconstruction: learn weights, biases and scales so that the quantized output approaches the float one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from vitquant.errors import CalibrationError, RecipeError
from vitquant.methods.context import Context
from vitquant.methods.student import Rates, Student, cosine_decay
from vitquant.model import QuantizedModel, Record
from vitquant.schema import ListOf, Number
from vitquant.work import WorkState

_ERRORS = ListOf(Number(0.0, 1e30), most=2**24)


@dataclass(frozen=True)
class ReconstructOutputSettings:
    """The length of the training and its learning rates.

    Arguments:
        steps: of the training. The calibration images are gone through as often as that takes.
        batch: the number of images in a step, which are in memory with all activations that their gradients need.
        weights: Adam's initial learning rate of quantized weights, in steps of their quantizers. All rates decay to 0
            along a cosine.
        others: the initial learning rate of biases, norms and embeddings, in their own units.
        scales: the initial learning rate of the logarithms of activations' scales.
        norms: the weight of the error of the LayerNorms' and RMSNorms' outputs beside that of the model's output.

    Raises:
        RecipeError: a number out of range.
    """

    steps: int = 256
    batch: int = 8
    weights: float = 2e-3
    others: float = 2e-4
    scales: float = 2e-3
    norms: float = 1.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
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
    weights and all zero points stay. Labels are not used. Each step takes a float forward pass, a forward pass and a
    backward pass over a batch; neither time nor memory grows with the amount of data.

    Arguments:
        model: calibrated, its operations still in float.
        context: its data are iterated over as often as the steps take; its teacher is used. After an interruption, a
            later call with the same work state continues; at the deadline it ends with what is learned so far.
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
    sizes = [len(batch) for batch in context.data]
    if not sizes:
        raise CalibrationError("no calibration images: give at least one batch")
    in_a_pass = sum(math.ceil(size / settings.batch) for size in sizes)
    total = settings.steps
    rates = Rates(settings.weights, settings.others, settings.scales)
    with Student.learning(model, context, rates, settings.norms) as student:
        errors = _resumed(student, context.work, total)
        for images in islice(_steps(context.data, settings), len(errors), None):
            if context.out_of_time:
                context.work.save(student.state(), errors)
                break
            context.progress("reconstructing the output", len(errors), total)
            output, loss = student.losses(images, cosine_decay(len(errors), total))
            if not math.isfinite(loss.item()):
                raise CalibrationError(
                    f"the output error is {output.item()} in step {len(errors) + 1} of {total}: "
                    "lower weights, others and scales of reconstruct-output"
                )
            student.step(loss)
            errors.append(output.item())
            if context.work.due:
                context.work.save(student.state(), errors)
    if len(errors) != total and not context.out_of_time:
        raise CalibrationError("the images cannot be gone through again: give a list of batches or a DataLoader")
    context.progress("reconstructing the output", len(errors), total)
    summary = {"images": sum(sizes), "steps": len(errors), "of": total}
    if errors:
        first, last = errors[:in_a_pass], errors[-in_a_pass:]  # the same images, where the steps are whole passes
        summary |= {
            "output error, first pass": sum(first) / len(first),
            "output error, last pass": sum(last) / len(last),
        }
    return Record("reconstruct-output", summary)


def _resumed(student: Student, work: WorkState, total: int) -> list[float]:
    """The output errors of the steps that a killed run had done, whose state the student then has.

    Raises:
        CheckpointError: the state is damaged, or is not of this model.
    """
    saved = work.load(_ERRORS)
    if saved is None:
        return []
    if len(saved.values) > total:
        raise saved.damaged()
    student.put_state(saved)
    return list(saved.values)


def _steps(data: Iterable[Tensor], settings: ReconstructOutputSettings) -> Iterator[Tensor]:
    """The images of every step, at most `settings.steps`; fewer if the data can be iterated over only once.

    A batch is copied, since it may be an inference tensor, which autograd cannot save for backward.
    """

    def passes() -> Iterator[Tensor]:
        while True:
            empty = True
            for batch in data:
                empty = False
                yield from batch.clone().split(settings.batch)
            if empty:
                return

    return islice(passes(), settings.steps)

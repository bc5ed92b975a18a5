"""Adversarial distillation: make images on which the quantized model is worst, train it on them, and begin again."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitquant.errors import CalibrationError, ModelError, RecipeError
from vitquant.methods.context import Context
from vitquant.methods.student import Rates, Student, cosine_decay
from vitquant.model import QuantizedModel, Record
from vitquant.schema import Integer, ListOf, Number, Table
from vitquant.seeding import generator_for
from vitquant.synthesis.patch_similarity import (
    Draws,
    Objective,
    PatchSimilaritySettings,
    images_at_once,
    optimize,
)
from vitquant.work import WorkState

_NAME = "distill-adversarially"
_STATE = Table(
    {
        "cycle": Integer(0),
        "errors": ListOf(Number(0.0, 1e30), most=2**24),
        "made": ListOf(Integer(0), most=2**20),
    }
)


@dataclass(frozen=True)
class DistillAdversariallySettings:
    """How images are made and how the student is trained, in turn.

    Arguments:
        cycles: how many times images are made, and the student then trained.
        images: how many are made in a cycle.
        iterations: of the optimization of these images; 0 makes none, and the student learns from the calibration
            images alone.
        rate, warmup: of the images, see `PatchSimilaritySettings`.
        start: what images begin with, see `PatchSimilaritySettings`.
        variation_weight: of the images' total variation.
        class_weight: of the cross entropy with a class drawn for each image, as in `PatchSimilaritySettings`.
        disagreement: the weight of the student's output error, which the images raise, beside their entropy.
        steps: of the student's training in each cycle.
        batch: the number of images in a step.
        buffer: the most images that are trained on, of those that are made (the latest), and of calibration images.
        weights, others, scales, norms: see `ReconstructOutputSettings`; rates decay to 0 over all cycles.

    Raises:
        RecipeError: a number out of range.
    """

    cycles: int = 4
    images: int = 32
    iterations: int = 200
    rate: float = 0.2
    warmup: int = 20
    start: str = "dead-leaves"
    variation_weight: float = 0.05
    class_weight: float = 1.0
    disagreement: float = 10.0
    steps: int = 64
    batch: int = 8
    buffer: int = 256
    weights: float = 2e-3
    others: float = 2e-4
    scales: float = 2e-3
    norms: float = 1.0

    def __post_init__(self) -> None:
        for name in ("cycles", "images", "steps", "batch", "buffer"):
            if not isinstance(getattr(self, name), int) or not 1 <= getattr(self, name) <= 1_000_000:
                raise RecipeError(f"{_NAME}: {name} = {getattr(self, name)}: it is a whole number from 1 to 1,000,000")
        for name in ("iterations", "warmup"):
            if not isinstance(getattr(self, name), int) or not 0 <= getattr(self, name) <= 1_000_000:
                raise RecipeError(f"{_NAME}: {name} = {getattr(self, name)}: it is a whole number from 0 to 1,000,000")
        for name, below in (("weights", 1), ("others", 1), ("scales", 1), ("norms", math.inf)):
            if not 0 <= getattr(self, name) < below:
                raise RecipeError(f"{_NAME}: {name} = {getattr(self, name)}: it is at least 0 and below {below}")
        if not 0 <= self.disagreement < math.inf:
            raise RecipeError(f"{_NAME}: disagreement = {self.disagreement}: it is 0 or more")
        if self.iterations:
            _ = self.synthesis  # refuses its own settings

    @property
    def synthesis(self) -> PatchSimilaritySettings:
        """How the images of a cycle are optimized, in one stage."""
        return PatchSimilaritySettings(
            self.iterations,
            (15,),
            self.rate,
            self.warmup,
            class_weight=self.class_weight,
            variation_weight=self.variation_weight,
            start=self.start,
        )


def check_attention(model: QuantizedModel, settings: DistillAdversariallySettings) -> None:
    """Refuse a model without attention, before any image is read.

    Raises:
        ModelError: it has none, and images are to be made.
    """
    if settings.iterations and not any(site.kind == "context" for site in model.sites):
        raise ModelError("the model has no attention, whose patches could be compared; iterations = 0 makes no images")


def distill_adversarially(model: QuantizedModel, context: Context, settings: DistillAdversariallySettings) -> Record:
    """Make images on which the quantized model disagrees with the float model, train it on them, and begin again.

    Images are optimized by the entropy of their patch similarities, their total variation, and the output error of the
    student, which they raise. The student is trained on them, on those of earlier cycles and on the calibration images
    as in `reconstruct_output`. No labels: the class of an image is drawn, where the model has classes.

    Arguments:
        model: calibrated, its operations still in float.
        context: its data are the first images to train on, and their least and largest values per channel are the
            limits of those that are made; its teacher is used. After an interruption, a later call with the same work
            state continues; at the deadline it ends with what is learned so far.
        settings: see `DistillAdversariallySettings`.

    Returns:
        The mean output error of the first and of the last cycle.

    Raises:
        CalibrationError: no data, torch cannot differentiate the model, or a loss becomes NaN or infinite.
        ModelError: the model has no attention between patches.

    Source: PSAQ-ViT V2, Li et al. 2023, whose weights and schedule no text gives and no code shows; what is minimized
        is output reconstruction's. docs/psaq-vit.md.

    Pitfall: the model is no longer the float model with quantizers in it: `run(quantized=False)` has other weights.
    """
    model.require_calibrated()
    assert context.teacher is not None
    images, limits = _calibration_images(context, settings.buffer)
    total = settings.cycles * settings.steps
    rates = Rates(settings.weights, settings.others, settings.scales)
    with Student.learning(model, context, rates, settings.norms) as student:
        buffer = _Buffer(images, settings.buffer, {})
        cycle, errors = _resumed(student, buffer, context.work, settings)
        while cycle < settings.cycles and not context.out_of_time:
            if settings.iterations and cycle not in buffer.made:
                made = _made(student, context, settings, cycle, limits)
                if made is None:
                    break
                buffer.add(cycle, made.to(images.dtype))
                _save(student, buffer, context.work, cycle, errors)
            _images_state(context.work, cycle).remove()
            while len(errors) < (cycle + 1) * settings.steps and not context.out_of_time:
                context.progress(f"distilling, cycle {cycle + 1}", len(errors), total)
                batch = buffer.drawn(context.seed, len(errors), settings.batch)
                output, loss = student.losses(batch, cosine_decay(len(errors), total))
                if not math.isfinite(loss.item()):
                    raise CalibrationError(
                        f"the output error is {output.item()} in step {len(errors) + 1} of {total}: "
                        f"lower weights, others and scales of {_NAME}"
                    )
                student.step(loss)
                errors.append(output.item())
                if context.work.due:
                    _save(student, buffer, context.work, cycle, errors)
            cycle += len(errors) == (cycle + 1) * settings.steps
            _save(student, buffer, context.work, cycle, errors)
    context.progress("distilling", len(errors), total)
    made = settings.images * (max(buffer.made, default=-1) + 1)
    summary = {"cycles": cycle, "of": settings.cycles, "images made": made, "steps": len(errors)}
    if errors:
        first, last = errors[: settings.steps], errors[-settings.steps :]
        summary |= {
            "output error, first cycle": sum(first) / len(first),
            "output error, last cycle": sum(last) / len(last),
        }
    return Record(_NAME, summary)


def _calibration_images(context: Context, most: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The first calibration images, and the least and largest value of each channel in all of them, (channels, 1, 1).

    Raises:
        CalibrationError: there are none.
    """
    kept: list[Tensor] = []
    ends: tuple[Tensor, Tensor] | None = None
    for batch in context.data:
        kept.append(batch[: most - sum(map(len, kept))].clone())
        low, high = (getattr(batch, side)(dim=(0, 2, 3))[:, None, None] for side in ("amin", "amax"))
        ends = (low, high) if ends is None else (torch.minimum(ends[0], low), torch.maximum(ends[1], high))
    if ends is None:
        raise CalibrationError("no calibration images: give at least one batch")
    return torch.cat(kept), (ends[0].to(torch.float32), ends[1].to(torch.float32))


@dataclass(frozen=True)
class _Buffer:
    """The images to train on.

    Arguments:
        given: calibration images, which stay.
        most: how many of those that are made are drawn from, the latest.
        made: those of the latest cycles, by the cycle's number.
    """

    given: Tensor
    most: int
    made: dict[int, Tensor]

    def add(self, cycle: int, images: Tensor) -> None:
        """Add the images of a cycle, and forget those that are not drawn any more."""
        self.made[cycle] = images
        while sum(map(len, self.made.values())) - len(self.made[min(self.made)]) >= self.most:
            del self.made[min(self.made)]

    def drawn(self, seed: int, step: int, batch: int) -> Tensor:
        """The images of a step: drawn without replacement, by the seed and the step."""
        made = [image for cycle in sorted(self.made) for image in self.made[cycle]][-self.most :]
        images = [*self.given, *made]
        order = torch.randperm(len(images), generator=generator_for(seed, f"{_NAME} step {step}"))
        return torch.stack([images[number] for number in order[:batch].tolist()])


def _made(
    student: Student,
    context: Context,
    settings: DistillAdversariallySettings,
    cycle: int,
    limits: tuple[Tensor, Tensor],
) -> Tensor | None:
    """The images of a cycle; None if the time is over.

    Raises:
        CalibrationError: the loss is not finite, or the memory is too small for one image.
    """
    assert context.teacher is not None

    def disagreement(images: Tensor, outputs: tuple[Tensor, ...]) -> Tensor:
        found = student.student(images)[: len(outputs)]
        each = [error(*pair) for error, pair in zip(student.errors, zip(found, outputs, strict=True), strict=True)]
        return torch.stack(each).mean(0)

    student.harden()
    with _frozen(student.model), _frozen(context.teacher):
        objective = Objective.of(
            context.teacher, settings.synthesis, context.logits, disagreement, settings.disagreement
        )
        purpose = f"{_NAME} cycle {cycle} "
        numbers, shape = range(settings.images), context.teacher.input_shape
        draws = Draws.of(context.seed, numbers, shape, limits, objective.classes, settings.synthesis, purpose)
        found = optimize(
            objective,
            draws,
            limits,
            images_at_once(objective, draws, context.memory),
            work=_images_state(context.work, cycle),
            out_of_time=lambda: context.out_of_time,
            progress=lambda what, done, total: context.progress(f"cycle {cycle + 1}: {what}", done, total),
        )
    if found.stopped:
        raise CalibrationError(f"{found.stopped} of the images of cycle {cycle + 1}: lower rate or disagreement")
    return found.images if len(found.trace) == settings.iterations else None


def _images_state(work: WorkState, cycle: int) -> WorkState:
    return WorkState(work.directory, f"{work.name}-images-{cycle}")


@contextmanager
def _frozen(module: nn.Module) -> Generator[None]:
    """Without gradients of the parameters, which would be computed with those of images."""
    asked = [(each, each.requires_grad) for each in module.parameters()]
    try:
        for each, _ in asked:
            each.requires_grad_(False)
        yield
    finally:
        for each, before in asked:
            each.requires_grad_(before)


def _save(student: Student, buffer: _Buffer, work: WorkState, cycle: int, errors: list[float]) -> None:
    made = {f"made/{number}": each for number, each in buffer.made.items()}
    values = {"cycle": cycle, "errors": errors, "made": sorted(buffer.made)}
    work.save(student.state() | made, values)


def _resumed(
    student: Student, buffer: _Buffer, work: WorkState, settings: DistillAdversariallySettings
) -> tuple[int, list[float]]:
    """The cycle and the output errors of a killed run, whose state the student and the buffer then have.

    Raises:
        CheckpointError: the state is damaged, or is not of this model.
    """
    saved = work.load(_STATE)
    if saved is None:
        return 0, []
    cycle, errors, made = (saved.values[key] for key in ("cycle", "errors", "made"))
    done = len(errors) // settings.steps
    if cycle > settings.cycles or done - cycle not in (0, 1) or done > settings.cycles or max(made, default=0) > cycle:
        raise saved.damaged()
    student.put_state(saved)
    like = buffer.given[:1].expand(settings.images, -1, -1, -1)
    buffer.made.update({number: saved.tensor(f"made/{number}", like) for number in made})
    return cycle, list(errors)

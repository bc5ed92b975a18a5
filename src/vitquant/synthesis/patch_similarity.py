"""Images whose patches are as different to a float model's attentions as those of photographs (PSAQ-ViT)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vitquant.errors import CalibrationError, RecipeError, first_line
from vitquant.graph.captured import CapturedModel
from vitquant.graph.segments import IMAGES, Segment
from vitquant.objectives.patch_similarity import BANDWIDTH, BYTES_OF_A_PAIR, POINTS, patch_entropy
from vitquant.objectives.total_variation import total_variation
from vitquant.progress import Progress, silent
from vitquant.schema import ListOf, Number
from vitquant.seeding import generator_for
from vitquant.synthesis.noise import NOISES
from vitquant.synthesis.patches import PatchFeatures
from vitquant.work import WorkState

_BETAS, _EPS = (0.5, 0.9), 1e-8  # of Adam
_AT_ONCE = 8  # images that are differentiated at a time, whose tensors then stay in the processor's cache
_SIDE = 224  # pixels, of the images for which published offsets are
_TARGETS = (2500.0, 3000.0)  # between which an image's total variation is drawn
_TRACE = ListOf(ListOf(Number(-1e30, 1e30), 4, 4), most=2**24)


@dataclass(frozen=True)
class PatchSimilaritySettings:
    """How long images are optimized, and what by.

    Arguments:
        iterations: of each of the stages.
        jitter: for each stage the largest offset by which images are rolled, in pixels of an image of 224.
        rate: Adam's learning rate after `warmup` iterations of a stage, from where it decays to 0 along a cosine.
        warmup: iterations.
        bandwidth, points: of the density of similarities, see `patch_entropy`.
        class_weight: of the cross entropy with a class drawn for each image; without effect where there are no classes.
        variation_weight: of the distance of the total variation from one drawn between 2500 and 3000.
        start: what images begin with, one of `NOISES`: `gaussian-noise` as published.
        precision: in which the model is computed, `float32` or `bfloat16`; images and losses are always float32.

    Raises:
        RecipeError: a number out of range.

    Source: PSAQ-ViT, Li et al. 2022, and its official code, whose values are the defaults.
    """

    iterations: int = 500
    jitter: tuple[int, ...] = (15, 30)
    rate: float = 0.2
    warmup: int = 100
    bandwidth: float = BANDWIDTH
    points: int = POINTS
    class_weight: float = 1.0
    variation_weight: float = 0.05
    start: str = "gaussian-noise"
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name, allowed, least, most in (
            ("iterations", int, 1, 1_000_000),
            ("warmup", int, 0, 1_000_000),
            ("points", int, 2, 10_000),
            ("rate", float, 0, 1e3),
            ("bandwidth", float, 1e-6, 1e3),
            ("class_weight", float, 0, 1e6),
            ("variation_weight", float, 0, 1e6),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, allowed)) or not least <= value <= most:
                kind = "a whole number" if allowed is int else "a number"
                raise RecipeError(f"synthesis: {name} = {value}: it is {kind} from {least:,} to {most:,}")
        jitter = tuple(self.jitter)
        if not jitter or not all(isinstance(each, int) and 0 <= each <= _SIDE for each in jitter):
            raise RecipeError(
                f"synthesis: jitter = {list(jitter)}: it is for each stage a number of pixels, 0 to {_SIDE}"
            )
        object.__setattr__(self, "jitter", jitter)
        for name, those in (("start", tuple(NOISES)), ("precision", ("float32", "bfloat16"))):
            if getattr(self, name) not in those:
                raise RecipeError(f"synthesis: {name} = {str(getattr(self, name))[:40]!r}: it is {', or '.join(those)}")

    @property
    def dtype(self) -> torch.dtype:
        """In which the model is computed."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    @property
    def steps(self) -> int:
        """The number of iterations in all stages."""
        return self.iterations * len(self.jitter)


class Losses(NamedTuple):
    """The parts of the loss of each image, (images,) each, before they are weighted.

    Arguments:
        entropy: the sum over the attentions.
        classes: the cross entropy with the class of the image; 0 without classes.
        variation: the distance of the total variation from the one that was drawn.
        disagreement: of a student with the model; 0 without one.
    """

    entropy: Tensor
    classes: Tensor
    variation: Tensor
    disagreement: Tensor


# From images, and the outputs of the model for them, to how far a student is from them: (images,), differentiable.
Disagreement = Callable[[Tensor, tuple[Tensor, ...]], Tensor]


@dataclass(frozen=True)
class Objective:
    """What the images of a float model are optimized by.

    Use `of` to create one.

    Arguments:
        segment: computes the contexts of the attentions from images, and then outputs of the model.
        features: which contexts these are.
        settings: the weights.
        logits: which of the outputs are logits, by which images get a class; None without classes.
        classes: how many there are; 1 without.
        disagreement: of a student with the outputs, which the images raise; None without a student.
        disagreement_weight: its weight.
    """

    segment: Segment
    features: PatchFeatures
    settings: PatchSimilaritySettings
    logits: int | None
    classes: int
    disagreement: Disagreement | None = None
    disagreement_weight: float = 0.0

    @classmethod
    def of(
        cls,
        model: CapturedModel,
        settings: PatchSimilaritySettings,
        logits: str | None,
        disagreement: Disagreement | None = None,
        disagreement_weight: float = 0.0,
    ) -> Objective:
        """The objective of a model.

        Arguments:
            model: in float; its parameters need no gradients.
            settings: see `PatchSimilaritySettings`.
            logits: which of the model's outputs, by name, holds class logits; None for a model without classes.
            disagreement: of a student with all outputs of the model, in graph order.
            disagreement_weight: its weight.

        Raises:
            ModelError: the model has no attention between patches.
        """
        features = PatchFeatures.of(model)
        outputs = dict(zip(model.outputs, (site.name for site in model.sites if site.kind == "output"), strict=True))
        classified = logits if settings.class_weight else None
        wanted = [name for name in outputs if disagreement is not None or name == classified]
        return cls(
            model.segment(IMAGES, (*features.sites, *(outputs[name] for name in wanted))),
            features,
            settings,
            None if classified is None else wanted.index(classified),
            1 if classified is None else model.outputs[classified][1],
            disagreement,
            disagreement_weight,
        )

    def losses(self, images: Tensor, classes: Tensor, targets: Tensor) -> Losses:
        """The parts of the loss for some images.

        Arguments:
            images: (images, channels, height, width).
            classes: int64 (images,), that the model is to see in them.
            targets: float (images,), of the total variation.
        """
        given = images.to(next(self.segment.parameters()).dtype)
        computed = self.segment(given)
        contexts, outputs = computed[: len(self.features.sites)], computed[len(self.features.sites) :]
        entropies = [
            patch_entropy(each, self.settings.bandwidth, self.settings.points)
            for each in self.features.split(contexts, len(images))
        ]
        variation = (total_variation(images) - targets).abs()
        cross = disagreement = torch.zeros_like(variation)
        if self.logits is not None:
            logits = outputs[self.logits]
            logits = logits.to(torch.promote_types(logits.dtype, images.dtype))
            cross = functional.cross_entropy(logits, classes, reduction="none")
        if self.disagreement is not None:
            disagreement = self.disagreement(given, outputs)
        return Losses(torch.stack(entropies).sum(0), cross, variation, disagreement)

    def bytes_of_pairs(self, images: Tensor) -> int:
        """What the entropy of the largest attention takes while it is computed for one image.

        Arguments:
            images: one, (1, channels, height, width).
        """
        contexts = self.segment(images.to(next(self.segment.parameters()).dtype))[: len(self.features.sites)]
        shapes = [each.shape for each in self.features.split(contexts, 1)]
        return max(windows * patches**2 for _, windows, patches, _ in shapes) * BYTES_OF_A_PAIR

    def total(self, losses: Losses) -> Tensor:
        """The loss of each image, (images,)."""
        settings = self.settings
        return (
            -losses.entropy
            + settings.class_weight * losses.classes
            + settings.variation_weight * losses.variation
            - self.disagreement_weight * losses.disagreement
        )


@dataclass(frozen=True)
class Draws:
    """The random numbers of a synthesis: those of an image depend on its number, and not on which others there are.

    Arguments:
        start: where the images begin, (images, channels, height, width), noise.
        classes: int64 (images,).
        targets: of the total variation, (images,).
        offsets: by how many pixels all images are rolled in each iteration.
        flips: whether all images are mirrored in each iteration.
    """

    start: Tensor
    classes: Tensor
    targets: Tensor
    offsets: list[int]
    flips: list[bool]

    @classmethod
    def of(
        cls,
        seed: int,
        numbers: Sequence[int],
        shape: Sequence[int],
        limits: tuple[Tensor, Tensor],
        classes: int,
        settings: PatchSimilaritySettings,
        purpose: str = "",
    ) -> Draws:
        """The draws for images with these numbers.

        Arguments:
            seed: of all of them.
            numbers: of the images.
            shape: (channels, height, width).
            limits: the least and the largest value of every channel, (channels, 1, 1) each.
            classes: how many the model has; 1 where it has none.
            settings: the number of iterations, their offsets, and what images begin with.
            purpose: tells these draws from others with the same seed and numbers.
        """
        limits = (limits[0].cpu(), limits[1].cpu())
        starts, chosen, targets = [], [], []
        low, high = _TARGETS
        for number in numbers:
            generator = generator_for(seed, f"{purpose}image {number}")
            starts.append(NOISES[settings.start](shape, limits, generator))
            chosen.append(int(torch.randint(classes, (), generator=generator)))
            targets.append(low + (high - low) * float(torch.rand((), generator=generator)))
        generator = generator_for(seed, f"{purpose}jitter")
        offsets: list[int] = []
        for largest in settings.jitter:
            limit = round(largest * max(shape[1:]) / _SIDE)
            offsets += torch.randint(-limit, limit + 1, (settings.iterations,), generator=generator).tolist()
        flips = (torch.rand(settings.steps, generator=generator) < 0.5).tolist()
        return cls(torch.stack(starts), torch.tensor(chosen), torch.tensor(targets), offsets, flips)


@dataclass
class _Optimization:
    """The state of an optimization: the images, Adam's moments, and the mean losses of every iteration so far."""

    images: Tensor
    optimizer: torch.optim.Adam
    trace: list[list[float]]

    @classmethod
    def begun(cls, images: Tensor) -> _Optimization:
        return cls(images, _adam(images), [])

    def save(self, work: WorkState) -> None:
        state = self.optimizer.state.get(self.images, {})
        tensors = {"images": self.images.detach(), **{f"adam/{key}": torch.as_tensor(x) for key, x in state.items()}}
        work.save(tensors, self.trace)

    def resume(self, work: WorkState, steps: int) -> None:
        saved = work.load(_TRACE)
        if saved is None:
            return
        if len(saved.values) > steps:
            raise saved.damaged()
        with torch.no_grad():
            self.images.copy_(saved.tensor("images", self.images))
        if state := saved.adam("adam", self.images):
            self.optimizer.state[self.images] = state
        self.trace.extend(saved.values)


@dataclass(frozen=True)
class Optimized:
    """Optimized images.

    Arguments:
        images: (images, channels, height, width), normalized as the model takes them.
        trace: for each iteration that was done the means of the parts of the loss, in the order of `Losses`.
        stopped: why the optimization stopped early, one line; empty if it did not, or at a time limit.
    """

    images: Tensor
    trace: list[list[float]]
    stopped: str = ""


def optimize(
    objective: Objective,
    draws: Draws,
    limits: tuple[Tensor, Tensor],
    at_once: int,
    *,
    work: WorkState | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
    progress: Progress = silent,
) -> Optimized:
    """Optimize images by gradients of the loss.

    Arguments:
        objective: see `Objective`.
        draws: where they begin, and all random numbers.
        limits: the least and the largest value of every channel, (channels, 1, 1) each, to which images are clamped
            after every iteration.
        at_once: how many images are differentiated at a time. The result depends on it by the rounding of sums only.
        work: where the state is saved; a later call with the same draws continues.
        out_of_time: asked before every iteration; the images so far are then the result.
        progress: called with the entropy and the loss, the iterations that are done, and their number.

    Returns:
        The images; those of the iteration before, if the loss becomes NaN or infinite.

    Raises:
        CalibrationError: torch cannot differentiate the model.

    Source: PSAQ-ViT, algorithm 1.
    """
    settings, work = objective.settings, WorkState() if work is None else work
    device = limits[0].device
    with torch.inference_mode(False), torch.enable_grad():
        state = _Optimization.begun(draws.start.to(device).clone().requires_grad_(True))
        classes, targets = draws.classes.to(device), draws.targets.to(device)
        state.resume(work, settings.steps)
        stopped = ""
        while len(state.trace) < settings.steps and not out_of_time():
            step = len(state.trace)
            stage_step = step % settings.iterations
            if stage_step == 0 and step:
                state.optimizer = _adam(state.images)
            state.optimizer.param_groups[0]["lr"] = _rate(stage_step, settings)
            state.optimizer.zero_grad()
            try:
                losses = _differentiated(objective, state.images, draws, step, (classes, targets), at_once)
            except torch.OutOfMemoryError as error:
                state.save(work)
                raise CalibrationError(f"{at_once} images at a time do not fit; allow less memory") from error
            gradient = state.images.grad
            if not all(map(math.isfinite, losses)) or gradient is None or not bool(torch.isfinite(gradient).all()):
                stopped = f"the loss or its gradient is not finite in iteration {step + 1} of {settings.steps}"
                break
            state.optimizer.step()
            with torch.no_grad():
                state.images.clamp_(*limits)
            state.trace.append(losses)
            total = objective.total(Losses(*map(torch.tensor, losses))).item()
            progress(f"synthesizing, entropy {losses[0]:.2f}, loss {total:.4g}", step + 1, settings.steps)
            if work.due:
                state.save(work)
        state.save(work)
    return Optimized(state.images.detach(), state.trace, stopped)


def _differentiated(
    objective: Objective, images: Tensor, draws: Draws, step: int, given: tuple[Tensor, Tensor], at_once: int
) -> list[float]:
    """Add the gradient of the loss to that of the images; returns the means of its parts."""
    sums = torch.zeros(len(Losses._fields), dtype=torch.float64)
    parts = zip(*(each.split(at_once) for each in (images, *given)), strict=True)
    for part, classes, targets in parts:
        moved = part.roll((draws.offsets[step],) * 2, dims=(2, 3))
        losses = objective.losses(moved.flip(3) if draws.flips[step] else moved, classes, targets)
        sums += torch.stack([each.detach().sum().cpu().double() for each in losses])
        if not bool(torch.isfinite(sums).all()):
            break
        _backward(objective.total(losses).sum())
    return (sums / len(images)).tolist()


def images_at_once(objective: Objective, draws: Draws, memory: float) -> int:
    """How many images can be differentiated at a time.

    Arguments:
        objective, draws: see `optimize`.
        memory: gigabytes that a gradient may hold.

    Raises:
        CalibrationError: not even one; or the model cannot be computed in the precision of its parameters.
    """
    one = _bytes_of_one(objective, draws)
    fit = int(memory * 1e9 // one)
    if fit < 1:
        raise CalibrationError(
            f"a gradient for one image takes {one / 1e9:.3g} GB, and {memory:.3g} GB are allowed; allow more memory"
        )
    return min(fit, _AT_ONCE)


def _bytes_of_one(objective: Objective, draws: Draws) -> int:
    """The number of bytes that a gradient of the loss holds for one image, from the difference of two and one."""
    device = next(objective.segment.parameters()).device

    def held(images: int) -> int:
        seen: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return x

        start = draws.start[:1].expand(images, -1, -1, -1).to(device).clone().requires_grad_(True)
        labels, targets = (each[:1].expand(images).to(device) for each in (draws.classes, draws.targets))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            objective.total(objective.losses(start, labels, targets)).sum()
        return sum(seen.values())

    try:
        with torch.inference_mode(False), torch.enable_grad():
            return max(1, held(2) - held(1)) + objective.bytes_of_pairs(draws.start[:1].to(device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as refused:
        dtype = next(objective.segment.parameters()).dtype
        raise CalibrationError(f"the model cannot be computed in {dtype}: {first_line(refused)}") from refused


def _adam(images: Tensor) -> torch.optim.Adam:
    return torch.optim.Adam([images], betas=_BETAS, eps=_EPS)


def _rate(step: int, settings: PatchSimilaritySettings) -> float:
    """The learning rate of an iteration of a stage."""
    if step < settings.warmup:
        return settings.rate * (step + 1) / settings.warmup
    share = (step - settings.warmup) / max(1, settings.iterations - settings.warmup)
    return settings.rate * 0.5 * (1 + math.cos(math.pi * share))


def _backward(loss: Tensor) -> None:
    try:
        loss.backward()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as refused:
        raise CalibrationError(f"torch computes no gradients of this model: {first_line(refused)}") from refused

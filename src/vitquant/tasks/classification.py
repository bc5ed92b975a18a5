"""Accuracy of a classifier, compared with its float model on the same images."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitquant.calibration_data import Batch, images_of, labels_of
from vitquant.errors import DataError, ModelError
from vitquant.graph.outputs import named_tensors
from vitquant.progress import Progress, silent
from vitquant.tasks.classes import refuse_features
from vitquant.tasks.doubt import Z95, doubt
from vitquant.tasks.images import ImageBatches
from vitquant.tasks.running import evaluating, place_of, run_on

T = TypeVar("T")


@dataclass(frozen=True)
class ClassificationResult:
    """The figures of one evaluation; accuracies and agreement are percentages of `images`.

    Arguments:
        engine: the engine that computed the logits, e.g. `simulated`.
        float_top1, agreement, top1_difference_interval: None without a float model. Agreement is
            the share of images given the float model's class; the interval is the paired 95 % one
            of `top1 - float_top1`, in percentage points.
        seconds: spent in the evaluated model alone.
        doubt: why the labels may not match the model's classes, in one line, judged by the float model if there is one;
            None if there is no sign of a mismatch.
    """

    engine: str
    images: int
    top1: float
    top5: float
    float_top1: float | None
    agreement: float | None
    top1_difference_interval: tuple[float, float] | None
    seconds: float
    doubt: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks to show with the figures, one line each."""
        return () if self.doubt is None else (self.doubt,)


def evaluate(
    model: Callable[[Tensor], Any],
    float_model: Callable[[Tensor], Any] | None,
    batches: Iterable[Batch],
    progress: Progress = silent,
    engine: str = "simulated",
) -> ClassificationResult:
    """Run a model, and its float model if given, over labelled batches, keeping only counts in memory.

    Arguments:
        model, float_model: modules (run in eval mode, on their own device) or any callables that
            return logits of shape (images, classes), as a tensor or as `.logits`.
        progress: called after each batch with the number of images done and the total, 0 if that is not known.

    Raises:
        ModelError: logits have another shape or are not finite (the first such image is named), or a model has no head.
        DataError: there are no images, or a label is not a class of the model.

    Pitfall: both models run on every batch; without the float model it takes half the time.
    """
    for each in (model, float_model):
        if isinstance(each, nn.Module):
            refuse_features(each)
    counts, seconds = _Counts(), 0.0
    with evaluating(model, float_model):
        for batch in batches:
            images, labels = images_of(batch), labels_of(batch)
            started = time.perf_counter()
            logits = logits_of(run_on(model, images)).cpu()  # the copy synchronizes with the device, for the timing
            seconds += time.perf_counter() - started
            reference = None
            if float_model is not None:
                reference = logits_of(run_on(float_model, images)).cpu()
            for who, values in (("the model", logits), ("the float model", reference)):
                if values is not None:
                    _check(values, who, len(labels), batches, counts.images)
            if reference is not None and reference.shape != logits.shape:
                raise ModelError(
                    f"the model gives logits of {logits.shape[1]} classes, the float model of {reference.shape[1]}; "
                    "give the float model that it was made from"
                )
            counts.add(logits, reference, labels)
            progress("evaluating", counts.images, len(batches.items) if isinstance(batches, ImageBatches) else 0)
    return counts.result(engine, seconds)


def compare(
    logits: Tensor, float_logits: Tensor | None, labels: Tensor, engine: str = "simulated", seconds: float = 0.0
) -> ClassificationResult:
    """The figures of given logits, (images, classes), one row per label.

    Raises:
        DataError: there are no images, or a label is not a class.
    """
    counts = _Counts()
    counts.add(logits, float_logits, labels)
    return counts.result(engine, seconds)


def paired_interval(a_correct: Sequence[bool] | Tensor, b_correct: Sequence[bool] | Tensor) -> tuple[float, float]:
    """The 95 % interval, in percentage points, of the accuracy of `a` minus that of `b` on the same images.

    It is Tango's score interval (Statistics in Medicine 17, 1998), which is valid even if few images
    differ: if none of n differ, it is about +-3.84/(n+3.84), not zero.

    Raises:
        DataError: there are no images, or the numbers of results differ.
    """
    a, b = torch.as_tensor(a_correct).bool(), torch.as_tensor(b_correct).bool()
    if a.shape != b.shape or a.numel() == 0:
        raise DataError(f"a paired interval needs as many results of both, and one at least: {a.numel()}, {b.numel()}")
    return _score_interval(a.numel(), int((a & ~b).sum()), int((b & ~a).sum()))


def logits_of(output: object) -> Tensor:
    """The logits in the output of a library's classifier: a tensor, or an object or mapping with `logits`.

    Raises:
        ModelError: the output has no logits.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        logits = output if isinstance(output, Tensor) else logits_among(named_tensors(output))
    if logits is None:
        raise ModelError(
            f"the model gives {type(output).__name__}; a classifier gives one tensor, or an object with .logits"
        )
    return logits


def class_count(outputs: Mapping[str, Sequence[int]]) -> int | None:
    """The number of classes of a model by the shapes of its outputs; None if it gives no logits (images, classes)."""
    logits = logits_among(outputs)
    return logits[1] if logits is not None and len(logits) == 2 else None


def check_classifier(model: nn.Module, outputs: Mapping[str, Sequence[int]]) -> None:
    """Refuse a model that is no classifier.

    Arguments:
        model: the float model, or any module of which it is not known whether it has a head.
        outputs: the shapes of its outputs by name.

    Raises:
        ModelError: it has no head, or gives no logits.
    """
    refuse_features(model)
    if class_count(outputs) is None:
        given = ", ".join(f"{name} {list(shape[1:])}" for name, shape in outputs.items())
        raise ModelError(f"the model gives no logits, one number for each class: its outputs are {given} for an image")


def logits_among(outputs: Mapping[str, T]) -> T | None:
    """The entry for the logits among a model's outputs by name: `logits`, or the only output; None if neither."""
    return outputs.get("logits", next(iter(outputs.values())) if len(outputs) == 1 else None)


def same_classes(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Tensor:
    """For which images two forms of a classifier predict the same class: bool (images,); ties go to the lower class.

    Arguments:
        found, reference: the outputs of both, by name.

    Raises:
        ModelError: there are no logits among the outputs.
    """
    return _classes(found) == _classes(reference)


def _classes(outputs: Mapping[str, Tensor]) -> Tensor:
    logits = logits_among(outputs)
    if logits is None or logits.ndim != 2:
        raise ModelError(f"the model gives no logits (images, classes) among: {', '.join(outputs)}")
    # stable, so that ties (frequent in integer logits) fall to the lower class on every device
    return logits.double().sort(dim=1, descending=True, stable=True).indices[:, 0]


class _Counts:
    """The counts from which the figures are computed, over the images so far."""

    def __init__(self) -> None:
        self.images = self.top1 = self.top5 = self.agree = self.only_model = self.only_float = 0
        self.compared = False
        self.classes, self.confidence = 0, 0.0
        self.pairs: Counter[tuple[int, int]] = Counter()  # (label, prediction), of the float model if there is one

    def add(self, logits: Tensor, float_logits: Tensor | None, labels: Tensor) -> None:
        labels, classes = labels.cpu(), logits.shape[1]
        if outside := [int(label) for label in labels if not 0 <= label < classes]:
            raise DataError(f"class index {outside[0]} (-1: no label), but the model has {classes} classes")
        # stable, so that ties (frequent in integer logits) fall to the lower class on every device
        ranked = logits.sort(dim=1, descending=True, stable=True).indices[:, :5]
        right = ranked[:, 0] == labels
        self.images += len(labels)
        self.top1 += int(right.sum())
        self.top5 += int((ranked == labels[:, None]).any(dim=1).sum())
        judge, predicted = logits, ranked[:, 0]
        if float_logits is not None:
            judge = float_logits
            predicted = float_logits.sort(dim=1, descending=True, stable=True).indices[:, 0]
            self.compared = True
            self.agree += int((ranked[:, 0] == predicted).sum())
            self.only_model += int((right & (predicted != labels)).sum())
            self.only_float += int((~right & (predicted == labels)).sum())
        self.classes = classes
        self.confidence += float(judge.double().softmax(dim=1).amax(dim=1).sum())
        self.pairs.update(zip(labels.tolist(), predicted.tolist(), strict=True))

    def result(self, engine: str, seconds: float) -> ClassificationResult:
        if not self.images:
            raise DataError("no images to evaluate on")
        float_top1 = 100 * (self.top1 - self.only_model + self.only_float) / self.images
        return ClassificationResult(
            engine=engine,
            images=self.images,
            top1=100 * self.top1 / self.images,
            top5=100 * self.top5 / self.images,
            float_top1=float_top1 if self.compared else None,
            agreement=100 * self.agree / self.images if self.compared else None,
            top1_difference_interval=(
                _score_interval(self.images, self.only_model, self.only_float) if self.compared else None
            ),
            seconds=seconds,
            doubt=doubt(self.pairs, self.classes, self.confidence / self.images),
        )


def _score_interval(n: int, only_a: int, only_b: int) -> tuple[float, float]:
    """All differences d that the score test (observed - d)^2 <= z^2 var(d) does not reject, in percent."""

    def accepted(d: float) -> bool:
        # the probability of "only b", at its maximum likelihood under p(only a) - p(only b) = d
        linear = (2 * n - only_a + only_b) * d - only_a - only_b
        root = math.sqrt(max(linear * linear + 8 * n * only_b * d * (1 - d), 0.0))
        p = max((root - linear) / (4 * n), 0.0, -d)
        return (only_a - only_b - n * d) ** 2 <= Z95**2 * n * (2 * p + d * (1 - d))

    def limit(end: float) -> float:
        inside, outside = (only_a - only_b) / n, end
        if accepted(end):
            return end
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if accepted(middle) else (inside, middle)
        return inside

    return 100 * limit(-1.0), 100 * limit(1.0)


def _check(logits: Tensor, who: str, images: int, batches: Iterable[Any], done: int) -> None:
    if logits.ndim != 2 or len(logits) != images:
        raise ModelError(f"{who} gives logits of shape {tuple(logits.shape)}, not ({images}, classes)")
    finite = logits.isfinite().all(dim=1)
    if not finite.all():
        name = place_of(batches, done + int(finite.logical_not().nonzero()[0]))
        raise ModelError(f"{who} gives NaN or infinite logits, first for {name}; check its weights and calibration")

"""What a model's outputs mean: the one table of tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitquant.errors import DataError
from vitquant.objectives.relative_error import relative_error, shift_free_error
from vitquant.progress import Progress
from vitquant.tasks import classification, features
from vitquant.tasks.classes import is_headless
from vitquant.tasks.classification import ClassificationResult
from vitquant.tasks.features import FeaturesResult

Result = ClassificationResult | FeaturesResult
Model = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Task:
    """What one kind of outputs is compared by.

    Arguments:
        name: as it is asked for and saved.
        labelled: whether images need labels to be evaluated.
        evaluate: a model and its float model over batches.
        error: of an output, (images, ...), beside the float model's, for methods that learn: (images,), differentiable.
        same: which images two forms of a model, each a mapping of tensors by name, give the same answer: bool
            (images,); None where answers are numbers that only come close.
    """

    name: str
    labelled: bool
    evaluate: Callable[[Model, Model | None, Iterable[Any], Progress, str], Result]
    error: Callable[[Tensor, Tensor], Tensor]
    same: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor] | None


TASKS = {
    task.name: task
    for task in (
        # What all classes have in common changes no probability.
        Task("classification", True, classification.evaluate, shift_free_error, classification.same_classes),
        Task("features", False, features.evaluate, relative_error, None),
    )
}


def task_named(name: str) -> Task:
    """A task by its name.

    Raises:
        DataError: there is none of that name.
    """
    if name not in TASKS:
        raise DataError(f"task {name[:80]!r} is unknown; the tasks are: {', '.join(TASKS)}")
    return TASKS[name]


def task_of(model: nn.Module, outputs: Mapping[str, Sequence[int]]) -> Task:
    """The task of a model, as far as it can be told: classification where it gives logits, else features.

    Arguments:
        model: the float model, which says whether it has a head.
        outputs: the shapes of what it gives, by name, as `CapturedModel.outputs` has them.
    """
    logits = classification.logits_among(outputs)
    if logits is None or len(logits) != 2 or is_headless(model):
        return TASKS["features"]
    return TASKS["classification"]

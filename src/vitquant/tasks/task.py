"""The table of tasks: how the outputs of a model are evaluated."""

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
Shapes = Mapping[str, Sequence[int]]
OutputError = Callable[[Tensor, Tensor], Tensor]  # of an output and the float model's, (images, ...): (images,)


@dataclass(frozen=True)
class Task:
    """How one kind of outputs is evaluated and compared.

    Arguments:
        name: by which users choose it, and under which it is saved.
        labelled: whether evaluation needs labels.
        check: refuses a float model whose outputs, of these shapes by name, are not of the task.
        evaluate: evaluates a model, with its float model, on batches.
        errors: from the shapes of a model's outputs by name, for each output its error for methods that learn.
        logits: from the shapes of a model's outputs by name, the name of the one that holds class logits; None without.
        same: maps the outputs of two forms of a model, tensors by name, to the images with the same answer, bool
            (images,); None if the answers are real numbers, which are never exactly the same.
    """

    name: str
    labelled: bool
    check: Callable[[nn.Module, Shapes], None]
    evaluate: Callable[[Model, Model | None, Iterable[Any], Progress, str], Result]
    errors: Callable[[Shapes], tuple[OutputError, ...]]
    logits: Callable[[Shapes], str | None]
    same: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor] | None


def _of_logits(outputs: Shapes) -> tuple[OutputError, ...]:
    """A shift of all logits changes no probability; what else the model gives is compared as it is."""
    logits = _name_of_logits(outputs)
    shifted = (name == logits and shape[1] > 1 for name, shape in outputs.items())
    return tuple(shift_free_error if each else relative_error for each in shifted)


def _name_of_logits(outputs: Shapes) -> str | None:
    if classification.class_count(outputs) is None:
        return None
    return classification.logits_among({name: name for name in outputs})


def _of_features(outputs: Shapes) -> tuple[OutputError, ...]:
    return tuple(relative_error for _ in outputs)


def _no_logits(outputs: Shapes) -> None:
    """Features have no classes."""


def _anything(model: nn.Module, outputs: Shapes) -> None:
    """All outputs are features."""


TASKS = {
    task.name: task
    for task in (
        Task(
            "classification",
            True,
            classification.check_classifier,
            classification.evaluate,
            _of_logits,
            _name_of_logits,
            classification.same_classes,
        ),
        Task("features", False, _anything, features.evaluate, _of_features, _no_logits, None),
    )
}


def task_named(name: str) -> Task:
    """A task by its name.

    Raises:
        DataError: there is no task of that name.
    """
    if not isinstance(name, str) or name not in TASKS:
        raise DataError(f"task {str(name)[:80]!r} is unknown; the tasks are: {', '.join(TASKS)}")
    return TASKS[name]


def task_of(model: nn.Module, outputs: Shapes) -> Task:
    """The most likely task of a model: classification if it returns logits, else features.

    Arguments:
        model: the float model, to determine whether it has a head.
        outputs: the shapes of its outputs by name, as in `CapturedModel.outputs`.
    """
    classifies = classification.class_count(outputs) is not None and not is_headless(model)
    return TASKS["classification" if classifies else "features"]

"""Calibration: observers observe the float model on a few images, and quantizers get the ranges that they estimate.

Every operand is observed in the float model, as in FQ-ViT: no observer sees the error of another operand's quantizer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from vitquant.errors import CalibrationError
from vitquant.methods.context import Context
from vitquant.model import QuantizedModel, Record
from vitquant.observers import build_observer
from vitquant.observers.observer import Observer
from vitquant.quantizers import Quantizer, build_quantizer
from vitquant.recipe import Assignment
from vitquant.recipe.tables import within

_NO_SCORE = -1e4  # no model has softmax scores this low; libraries mask entries by adding this or less


@dataclass(frozen=True)
class CalibrateSettings:
    """Calibration has no settings of its own: each rule of a recipe names the observer of its operands."""


def calibrate(model: QuantizedModel, context: Context, settings: CalibrateSettings) -> Record:
    """Insert a quantizer for every operand that the recipe quantizes.

    It takes one float forward pass per batch; memory does not grow with the number of batches.

    Arguments:
        model: without quantizers.
        context: its data are iterated over once.
        settings: none.

    Raises:
        CalibrationError: no data; or an operand, named in the message, holds NaN, infinity, or scores with a mask.
    """
    observers = {name: observer_of(name, model.assignments[name]) for name in model.quantized_names}
    images, batches = observe(model, context.data, observers)
    for name, observer in observers.items():
        if any(reader.kind == "softmax" for reader in model.index.value(name).readers):
            _refuse_masked(name, observer)
    model.insert({name: estimated(name, observer) for name, observer in observers.items()})
    decisions = {}
    for name, observer in observers.items():
        low, high = observer.observed_range()
        decisions[name] = {"low": low.min().item(), "high": high.max().item()}
    return Record("calibrate", {"images": images, "batches": batches}, decisions)


def _refuse_masked(name: str, observer: Observer) -> None:
    """Refuse scores that include a mask which was not recognized: a quantizer would spread its levels over it."""
    low = observer.observed_range()[0].min().item()
    if low <= _NO_SCORE:
        raise CalibrationError(
            f"scores go down to {low:.3g}: a mask of finite numbers is added to them that the image decides, or that "
            "differs between the images of a batch; write it as masked_fill(masked, -torch.inf)",
            name,
        )


def observe(model: QuantizedModel, data: Iterable[torch.Tensor], observers: Mapping[str, Observer]) -> tuple[int, int]:
    """Update observers with the tensors of the float model, and with the stored tensors as they are now.

    Arguments:
        data: iterated over once, or not at all if all observers observe stored tensors.
        observers: by the name of the value that each observes.

    Returns:
        The number of images and of batches.

    Raises:
        CalibrationError: no data; or an operand, named in the message, holds NaN or infinity.
    """
    stored = {name for name in observers if model.index.value(name).parameter is not None}
    taps = {name: _tap(name, observer) for name, observer in observers.items() if name not in stored}
    batches = images = 0
    with torch.inference_mode():
        for batch in data if taps else ():
            model.run(batch, taps, quantized=False)
            batches, images = batches + 1, images + len(batch)
        if taps and not images:
            raise CalibrationError("no calibration images: give at least one batch")
        for name in sorted(stored):
            _tap(name, observers[name])(model.parameter(model.index.value(name)))
    return images, batches


def observer_of(name: str, assignment: Assignment) -> Observer:
    """A fresh observer for a value that the recipe quantizes.

    Raises:
        RecipeError: the observer does not fit the spec; the message names the rule and the value.
    """
    assert assignment.spec is not None
    assert assignment.observer is not None
    with within(f"rule {assignment.rule!r} at {name}"):
        return build_observer(assignment.observer, assignment.spec)


def estimated(name: str, observer: Observer) -> Quantizer:
    """The quantizer of a value, with the parameters that its observer estimates.

    Raises:
        CalibrationError: the observer observed nothing.
    """
    with _at(name):
        return build_quantizer(observer.spec, observer.estimate())


def _tap(name: str, observer: Observer) -> Callable[[torch.Tensor], None]:
    def update(x: torch.Tensor) -> None:
        with _at(name):
            observer.update(x)

    return update


@contextmanager
def _at(name: str) -> Generator[None]:
    """Add the name of a value to a `CalibrationError` raised inside."""
    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(error.problem, name) from error

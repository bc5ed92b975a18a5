"""The declaration of a method: when it runs, what it needs, and the check that runs before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

from vitquant.methods.context import Context
from vitquant.model import QuantizedModel, Record

Settings = TypeVar("Settings")


class Phase(IntEnum):
    """The order in which methods run, whatever order a recipe and its overlays name them in."""

    REWRITE = 1  # rewrites of the float model that preserve its function
    CALIBRATE = 2  # quantizers are made from the float model's tensors
    SEARCH = 3  # quantizers are chosen by the error that they cause
    RECONSTRUCT = 4  # weights and scales are learned by gradients, without labels
    TRAIN = 5  # the same with labels, or long training
    INTEGERS = 6  # operations are computed on codes; no method changes the model after this


@dataclass(frozen=True)
class Needs:
    """The requirements of a method.

    Arguments:
        passes: how many times it iterates over the calibration images, at least.
        gradients: whether torch has to differentiate the model.
        labels: whether it needs the class of every calibration image.
        teacher: whether it needs the float model beside the quantized one.
        memory: whether it uses memory up to the budget, so that the budget has an effect.
        workers: whether other processes can share its work.
    """

    passes: int = 0
    gradients: bool = False
    labels: bool = False
    teacher: bool = False
    memory: bool = False
    workers: bool = False


def never_idle(model: QuantizedModel) -> bool:
    """False: every model gives the method something to do."""
    return False


@dataclass(frozen=True)
class Definition(Generic[Settings]):
    """The definition of one method.

    Arguments:
        run: changes a model and returns the record of its decisions.
        settings: a frozen dataclass: its fields are the keys of the recipe's `[[method]]`.
        phase: when it runs; methods of one phase run in the order of the table.
        needs: its requirements.
        after: the methods whose results it works on, which a recipe must have too.
        check: refuses a model or settings that do not fit the method, before any image is read.
        idle: whether the method has nothing to do for a model, so that its needs do not apply.
    """

    run: Callable[[QuantizedModel, Context, Settings], Record]
    settings: type[Settings]
    phase: Phase
    needs: Needs = Needs()
    after: tuple[str, ...] = ()
    check: Callable[[QuantizedModel, Settings], None] | None = None
    idle: Callable[[QuantizedModel], bool] = never_idle

"""What a method says of itself: when it runs, what it needs, and what it refuses before any work is done."""

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

    REWRITE = 1  # the float model changes, and its function stays
    CALIBRATE = 2  # quantizers are made of what the float model computes
    SEARCH = 3  # and chosen by what they make of it
    RECONSTRUCT = 4  # weights and scales by gradients, without labels
    TRAIN = 5  # and with them, or for long
    INTEGERS = 6  # operations are computed on codes: nothing about them changes any more


@dataclass(frozen=True)
class Needs:
    """What a method cannot do without.

    Arguments:
        passes: how often it goes through the calibration images, at least.
        gradients: torch has to differentiate the model.
        labels: the class of every calibration image.
        teacher: the float model beside the quantized one.
        memory: whether it holds as much as it may, so that a budget changes something.
    """

    passes: int = 0
    gradients: bool = False
    labels: bool = False
    teacher: bool = False
    memory: bool = False


def never_idle(model: QuantizedModel) -> bool:
    """There is always something to do."""
    return False


@dataclass(frozen=True)
class Definition(Generic[Settings]):
    """One method.

    Arguments:
        run: what it does to a model; returns what it decided.
        settings: a frozen dataclass: its fields are the keys of the recipe's `[[method]]`.
        phase: when it runs; methods of one phase run in the order of the table.
        needs: see there.
        after: methods without which it has nothing to work on.
        check: refuses a model that the method does not fit, by what its recipe says, before images are looked at.
        idle: whether a model leaves the method nothing to do, so that it needs nothing either.
    """

    run: Callable[[QuantizedModel, Context, Settings], Record]
    settings: type[Settings]
    phase: Phase
    needs: Needs = Needs()
    after: tuple[str, ...] = ()
    check: Callable[[QuantizedModel, Settings], None] | None = None
    idle: Callable[[QuantizedModel], bool] = never_idle

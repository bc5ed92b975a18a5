"""Computing in a model's own precision even under autocast, whose less precise sums would round to other codes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Result = TypeVar("Result")


def autocasts(kind: str) -> bool:
    """Whether autocast is enabled for a kind of device, such as `cuda`."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def own_precision(kind: str) -> AbstractContextManager[object]:
    """A context without autocast for a kind of device; a null context if it is off, so that a capture records none."""
    return torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext()


def in_own_precision(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """A function that runs without autocast on the CPU and on the accelerator."""

    @wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        accelerator = torch.accelerator.current_accelerator()
        with own_precision("cpu"), own_precision("cpu" if accelerator is None else accelerator.type):
            return function(*args, **kwargs)

    return run

"""The inputs of a method beside the model: images, the float model, and limits of memory and time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from vitquant.graph.captured import CapturedModel
from vitquant.methods.recomputed import Recompute
from vitquant.progress import Progress, silent
from vitquant.seeding import generator_for
from vitquant.work import WorkState
from vitquant.workers.worker import Workers


@dataclass(frozen=True)
class Context:
    """The inputs that every method gets.

    Arguments:
        data: calibration batches, (batch, channels, height, width) on the model's device; it can be iterated over as
            many times as the method declares in its needs.
        labelled: the same batches, each with the classes of its images, (batch,) int64, for methods that need labels.
        output_errors: for each output of the model, the task's error of a quantized one against the float one, both
            (images, ...): (images,), differentiable; `relative_error` for all of them when empty.
        logits: which of the model's outputs, by name, holds class logits; None where none does.
        teacher: the float model, for methods that need it. It keeps its own weights when methods change those of the
            quantized model; rewrites that preserve the function are applied to both, so that their tensors correspond.
        seed: of all random draws.
        progress: called with the current activity, the amount done and the total.
        memory: gigabytes that a method may hold beside the models.
        deadline: when to stop, in seconds of `time.monotonic()`; the method then leaves a valid model, and its record
            says how far it came.
        work: where a method that takes long saves its state.
        integers: computes the outputs of the integer program of a model that changes, for methods that choose by what
            is deployed.
        workers: other processes that share the work of methods that need them; None for this one alone.
    """

    data: Iterable[torch.Tensor]
    labelled: Iterable[tuple[torch.Tensor, torch.Tensor]] = ()
    output_errors: Sequence[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = ()
    logits: str | None = None
    teacher: CapturedModel | None = None
    seed: int = 0
    progress: Progress = silent
    memory: float = 4.0
    deadline: float = math.inf
    work: WorkState = field(default_factory=WorkState)
    integers: Recompute | None = None
    workers: Workers | None = None

    @property
    def out_of_time(self) -> bool:
        """Whether the time limit has passed."""
        return time.monotonic() >= self.deadline

    def generator(self, name: str) -> torch.Generator:
        """A random generator for one purpose, which depends on the seed and the purpose only.

        Arguments:
            name: names the purpose, such as the method.
        """
        return generator_for(self.seed, name)

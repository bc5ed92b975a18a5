"""What a method is given beside the model: images, the float model, and how much of everything it may take."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from vitquant.graph.captured import CapturedModel
from vitquant.objectives.relative_error import relative_error
from vitquant.progress import Progress, silent
from vitquant.work import WorkState


@dataclass(frozen=True)
class Context:
    """What every method gets.

    Arguments:
        data: calibration batches, (batch, channels, height, width) on the model's device; it may be gone through as
            often as the method says that it needs.
        labelled: the same batches, each with the classes of its images, (batch,) int64, for methods that need labels.
        output_error: of an output, (images, ...), beside the float model's: (images,), differentiable; the task's.
        teacher: the float model, for methods that need it. Its weights are the float model's whatever methods make of
            the quantized model's; rewrites that leave the function as it is are done to both, so tensors correspond.
        seed: of everything that is drawn.
        progress: told what is being done, how much of it, and how much there is.
        memory: gigabytes that a method may hold beside the models.
        deadline: when to stop, in seconds of `time.monotonic()`; a method then leaves a whole model behind, and its
            record says how far it came.
        work: where a method that takes long keeps its state.
    """

    data: Iterable[torch.Tensor]
    labelled: Iterable[tuple[torch.Tensor, torch.Tensor]] = ()
    output_error: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = relative_error
    teacher: CapturedModel | None = None
    seed: int = 0
    progress: Progress = silent
    memory: float = 4.0
    deadline: float = math.inf
    work: WorkState = field(default_factory=WorkState)

    @property
    def out_of_time(self) -> bool:
        """Whether the time limit has passed."""
        return time.monotonic() >= self.deadline

    def generator(self, name: str) -> torch.Generator:
        """Random numbers for one purpose, the same for the same seed whatever else is drawn.

        Arguments:
            name: of the purpose, such as the method's.
        """
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

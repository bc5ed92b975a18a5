"""Division of work among the processes that torchrun starts."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from vitquant.errors import WorkerError, first_line

T = TypeVar("T")

_LONGEST_WAIT = timedelta(days=30)  # one process may have hours of work left when another has none


@dataclass(frozen=True)
class Ranks:
    """This process among those of a process group.

    Arguments:
        rank: its number.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of_this_process(cls) -> Ranks:
        """This process in torch's default process group; the only one if there is no group."""
        if not distributed.is_available() or not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def part(self, count: int) -> range:
        """Which of `count` pieces of work are this process's: consecutive ones, as many as others have, or one more."""
        return range(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def gathered(self, found: T) -> list[T]:
        """What every process found, in the order of their ranks; all of them have to call it."""
        if self.count == 1:
            return [found]
        every: list[Any] = [None] * self.count
        try:
            distributed.all_gather_object(every, found)
        except RuntimeError as error:
            raise WorkerError(f"another process of the group is lost: {first_line(error)}") from error
        return every


ALONE = Ranks()


@contextmanager
def process_group() -> Generator[Ranks]:
    """The process group of torchrun; this process alone where torchrun did not start it.

    Messages go between CPUs; each process of a machine has an accelerator of its own, where there are as many.

    Raises:
        WorkerError: the other processes cannot be reached.
    """
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        yield ALONE
        return
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
    except Exception as error:
        raise WorkerError(f"torchrun's other processes cannot be reached: {first_line(error)}") from error
    try:
        yield Ranks.of_this_process()
    finally:
        distributed.destroy_process_group()

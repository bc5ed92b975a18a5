"""What workers are: they answer requests, and one that is lost is started anew and asked again."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from vitquant.errors import VitquantError, WorkerError

Answering = Callable[[Any], Any]  # an answer depends on the request alone, not on earlier ones
Kept = Callable[[], Tensor]


class Worker(Protocol):
    """One process, here or elsewhere."""

    def ask(self, request: Any) -> None:
        """Begin to answer a request; every `ask` is followed by one `answer`."""
        ...

    def answer(self) -> Any:
        """Wait for the answer.

        Raises:
            VitquantError: as the worker raised it.
            WorkerError: the worker was lost several times at this request, or it raised what it should not.
        """
        ...

    def stop(self) -> None:
        """End the process."""
        ...


class Workers(Protocol):
    """Where workers run.

    Attributes:
        count: how many can run at the same time.
    """

    @property
    def count(self) -> int: ...

    def keep(self, tensor: Tensor) -> Kept:
        """A tensor that workers can read as often as they need it, without holding it."""
        ...

    def start(self, make: Callable[[], Answering]) -> Worker:
        """A new worker.

        Arguments:
            make: called in the new process, and again when it is lost; it can be pickled.
        """
        ...

    def first(self, asked: Sequence[Worker]) -> Worker:
        """Wait until one of some workers that were asked has an answer, or is lost."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What became of a request in a worker.

    Arguments:
        answer: what was computed.
        refusal: an error that a user can correct, or of the operating system.
        failure: the traceback of any other.
    """

    answer: Any = None
    refusal: VitquantError | OSError | None = None
    failure: str = ""

    @classmethod
    def of(cls, compute: Callable[[], Any]) -> Outcome:
        """The outcome of a computation."""
        try:
            return cls(compute())
        except (VitquantError, OSError) as refusal:
            return cls(refusal=refusal)
        except (Exception, SystemExit):
            return cls(failure=traceback.format_exc())

    def unpacked(self) -> Any:
        """The answer, or the error.

        Raises:
            VitquantError, OSError: what was raised in the worker.
            RuntimeError: something else was raised there; the message ends with its traceback.
        """
        if self.refusal is not None:
            raise self.refusal
        if self.failure:
            raise RuntimeError(f"{self.failure.strip().splitlines()[-1]}, in a worker:\n{self.failure}")
        return self.answer


def lost(times: int, how: str = "") -> WorkerError:
    """The error for a worker that was lost again and again.

    Arguments:
        times: how often, at one request.
        how: it ended the last time.
    """
    return WorkerError(
        f"a worker was lost {times} times at the same request{how and f' ({how})'}; where memory ran out, give fewer "
        "workers or a smaller memory budget"
    )

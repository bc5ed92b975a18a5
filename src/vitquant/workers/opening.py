"""Workers as a user asks for them: a number of processes, or a Ray cluster."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from operator import index
from typing import SupportsIndex

from vitquant.errors import WorkerError
from vitquant.workers.on_ray import RayWorkers
from vitquant.workers.processes import Processes
from vitquant.workers.worker import Workers

RAY = "ray"
MOST = 256


def asked_workers(asked: int | str) -> int | str:
    """What a user asks for, as a number where it is one.

    Arguments:
        asked: a number of processes, 0 for none beside this one, or "ray".

    Raises:
        WorkerError: it is something else.
    """
    if asked == RAY:
        return RAY
    if isinstance(asked, str):
        count = int(asked) if re.fullmatch("[0-9]{1,9}", asked) else -1
    else:
        count = index(asked) if isinstance(asked, SupportsIndex) else -1  # as NumPy's integers are
    if isinstance(asked, bool) or not 0 <= count <= MOST:
        raise WorkerError(f"workers = {asked}: it is a number of processes, 0 to {MOST}, or {RAY}")
    return count


def opened(asked: int | str) -> AbstractContextManager[Workers | None]:
    """Workers that end with the context; None for 0.

    Arguments:
        asked: see `asked_workers`.

    Raises:
        WorkerError: see `asked_workers` and `RayWorkers.opened`.
    """
    match asked_workers(asked):
        case 0:
            return nullcontext()
        case int(count):
            return Processes.opened(count)
        case str():
            return RayWorkers.opened()

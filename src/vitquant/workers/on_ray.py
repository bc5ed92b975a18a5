"""Workers as actors of a Ray cluster; those of a lost node are started on another."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitquant.errors import WorkerError, first_line, last_line
from vitquant.version import __version__
from vitquant.workers.worker import Answering, Kept, Outcome, Worker, lost

_PATIENCE = 5.0  # seconds for a cluster to be there; Ray itself tries for minutes
_LOSSES = 3  # of one worker at one request


class RayWorkers:
    """Actors of the Ray cluster that this process is connected to, as many as it has processors; use `opened`."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self.count = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._started: list[_RayWorker] = []

    @classmethod
    @contextmanager
    def opened(cls, address: str | None = None) -> Generator[RayWorkers]:
        """Workers on the cluster that this process is connected to already, or else on the one of an address.

        Arguments:
            address: as `ray.init` takes it; when None, the environment variable RAY_ADDRESS, or else a cluster that
                runs on this machine, or else a new one of this machine alone.

        Raises:
            WorkerError: Ray is not installed, the cluster cannot be reached, or has another version of Ray, Python,
                torch or vitquant.
        """
        try:
            import ray
        except ImportError as error:
            raise WorkerError("workers on Ray need it: pip install 'vitquant[ray]'") from error
        connected = ray.is_initialized()
        if not connected:
            _check_reachable(os.environ.get("RAY_ADDRESS") if address is None else address)
            ended = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, ended)  # Ray sets its own
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise WorkerError(f"the Ray cluster cannot be used: {first_line(error)}") from error
        workers = cls(ray)
        try:
            workers.check_versions()
            yield workers
        finally:
            for each in workers._started:
                each.stop()
            if not connected:
                ray.shutdown()

    def check_versions(self) -> None:
        """Refuse nodes with another torch or vitquant than here: they could compute other bits.

        Raises:
            WorkerError: there is one, or vitquant is missing there.
        """
        ray, here = self._ray, _versions()
        pinned = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        for node in [each["NodeID"] for each in ray.nodes() if each["Alive"]]:
            where = f"node {node[:8]} of the Ray cluster"
            asked = ray.remote(_versions).options(scheduling_strategy=pinned(node, soft=False), num_cpus=0)
            try:
                there = ray.get(asked.remote())
            except ray.exceptions.RayError as error:
                raise WorkerError(f"vitquant cannot run on {where}: {last_line(error)}") from error
            if there != here:
                found, wanted = (", ".join(f"{name} {of}" for name, of in each.items()) for each in (there, here))
                raise WorkerError(f"{where} has {found}, and here is {wanted}: install the same there")

    def keep(self, tensor: Tensor) -> Kept:
        """See `Workers`: in the cluster's store, which may spill it to disk."""
        return partial(_kept, self._ray.put(tensor.clone()))  # a view would travel with all that it is a view of

    def start(self, make: Callable[[], Answering]) -> Worker:
        """See `Workers`."""
        self._started.append(_RayWorker(self._ray, make))
        return self._started[-1]

    def first(self, asked: Sequence[Worker]) -> Worker:
        """See `Workers`."""
        by_reference = {each.asked: each for each in asked if isinstance(each, _RayWorker)}
        ready, _ = self._ray.wait(list(by_reference), num_returns=1)
        return by_reference[ready[0]]


class _RayWorker:
    """One actor, on another node than its neighbours where there are several."""

    def __init__(self, ray: Any, make: Callable[[], Answering]) -> None:
        self._ray, self._make = ray, ray.put(make)
        self._request: Any = None
        self.asked: Any = None
        self._start()

    def ask(self, request: Any) -> None:
        """See `Worker`."""
        self._request = request
        self.asked = self._actor.answer.remote(request)

    def answer(self) -> Any:
        """See `Worker`."""
        for left in reversed(range(_LOSSES)):
            try:
                outcome: Outcome = self._ray.get(self.asked)
            except self._ray.exceptions.RayError as error:
                self.stop()
                self._start()
                if not left:
                    raise lost(_LOSSES, last_line(error)) from error
                self.ask(self._request)
            else:
                return outcome.unpacked()
        raise AssertionError("the last loss raises")

    def stop(self) -> None:
        """See `Worker`."""
        self._ray.kill(self._actor)

    def _start(self) -> None:
        actor = self._ray.remote(_Actor).options(scheduling_strategy="SPREAD")
        self._actor = actor.remote(self._make)


class _Actor:
    """Answers requests on a node."""

    def __init__(self, make: Callable[[], Answering]) -> None:
        torch.set_num_threads(1)
        self._made = Outcome.of(make)

    def answer(self, request: Any) -> Outcome:
        made = self._made
        return made if made.answer is None else Outcome.of(partial(made.answer, request))


def _check_reachable(address: str | None) -> None:
    """Refuse the address of a cluster where nothing answers; other words than an address are left to Ray.

    Raises:
        WorkerError: nothing answers.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), _PATIENCE).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WorkerError(
            f"the Ray cluster at {address} cannot be reached: {reason}; start it, or unset RAY_ADDRESS"
        ) from error


def _versions() -> dict[str, str]:
    return {"vitquant": __version__, "torch": torch.__version__}


def _kept(reference: Any) -> Tensor:
    import ray

    return ray.get(reference)

"""Workers as processes of this machine."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from vitquant.workers.worker import Answering, Kept, Outcome, Worker, lost

_LOSSES = 3  # of one worker at one request


class Processes:
    """Processes that share the threads of this one; use `opened`.

    Arguments:
        count: how many.
        folder: for what they read; removed by its owner.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.count = count
        self._folder, self._files = folder, 0
        self._threads = max(1, torch.get_num_threads() // count)
        self._started: list[_Process] = []

    @classmethod
    @contextmanager
    def opened(cls, count: int) -> Generator[Processes]:
        """Processes that end with the context, and so do the files that they read.

        Pitfall: a script that is run as such needs `if __name__ == "__main__":`, since new processes import it.
        """
        with TemporaryDirectory(prefix="vitquant-") as folder:
            processes = cls(count, Path(folder))
            try:
                yield processes
            finally:
                for each in processes._started:
                    each.stop()

    def keep(self, tensor: Tensor) -> Kept:
        """See `Workers`: a file, read each time."""
        file = self._file()
        torch.save(tensor, file)
        return partial(torch.load, file, weights_only=True)

    def start(self, make: Callable[[], Answering]) -> Worker:
        """See `Workers`."""
        file = self._file()
        file.write_bytes(pickle.dumps(make))
        self._started.append(_Process(file, self._threads))
        return self._started[-1]

    def first(self, asked: Sequence[Worker]) -> Worker:
        """See `Workers`."""
        by_connection = {each.connection: each for each in asked if isinstance(each, _Process)}
        return by_connection[wait(by_connection)[0]]  # type: ignore[index]

    def _file(self) -> Path:
        self._files += 1
        return self._folder / str(self._files)


class _Process:
    """One process. Requests and answers go through a pipe, pickled as they are: no memory is shared.

    Arguments:
        file: of what makes the answering.
        threads: that it computes with.
    """

    def __init__(self, file: Path, threads: int) -> None:
        self._arguments = (file, threads)
        self._request = b""
        self._start()

    def ask(self, request: Any) -> None:
        """See `Worker`."""
        self._request = pickle.dumps(request)
        self._send()

    def answer(self) -> Any:
        """See `Worker`."""
        for _ in range(_LOSSES):
            try:
                outcome = pickle.loads(self.connection.recv_bytes())
            except (EOFError, OSError):
                self._start()
                self._send()
            else:
                return outcome.unpacked()
        raise lost(_LOSSES)

    def stop(self) -> None:
        """See `Worker`: it has nothing to end in order."""
        self.connection.close()
        self._process.kill()
        self._process.join()
        self._process.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()

    def _send(self) -> None:
        try:
            self.connection.send_bytes(self._request)
        except OSError:  # lost: `answer` sees it too
            return


def _serve(connection: Connection, file: Path, threads: int) -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    torch.set_num_threads(threads)
    made = Outcome.of(lambda: pickle.loads(file.read_bytes())())
    while True:
        try:
            request = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        outcome = made if made.answer is None else Outcome.of(partial(made.answer, request))
        try:
            connection.send_bytes(pickle.dumps(outcome))
        except OSError:
            return

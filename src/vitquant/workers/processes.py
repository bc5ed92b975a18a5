"""Workers as processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from vitquant.errors import WorkerError
from vitquant.workers.worker import Answering, Kept, Outcome, Worker, lost

_LOSSES = 3  # of one worker at one request
_PATIENCE = 1.0  # seconds that a process has to end by itself

_NOTHING = (0, Outcome())  # the number of no request


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
                    each.connection.close()
                for each in processes._started:
                    each.stop()

    def keep(self, tensor: Tensor) -> Kept:
        """See `Workers`: a file, read each time."""
        file = self._file()
        torch.save(tensor.clone(), file)  # a view would be saved with all that it is a view of
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
        while True:
            for connection in wait(by_connection):
                if by_connection[connection].receive():  # type: ignore[index]
                    return by_connection[connection]  # type: ignore[index]

    def _file(self) -> Path:
        self._files += 1
        return self._folder / str(self._files)


class _Process:
    """One process. Requests and answers are numbered, and go through a pipe, pickled as they are: no memory is shared.

    Arguments:
        file: of what makes the answering.
        threads: that it computes with.
    """

    def __init__(self, file: Path, threads: int) -> None:
        self._arguments = (file, threads)
        self._number, self._request = 0, b""
        self._start()

    def ask(self, request: Any) -> None:
        """See `Worker`."""
        self._number += 1
        self._request = pickle.dumps((self._number, request))
        if self._process is None:
            self._start()
        self._send()

    def answer(self) -> Any:
        """See `Worker`.

        Raises:
            WorkerError: see `Worker`; or no process can start here.
        """
        losses = 0
        while not self._answered:
            self.receive()
            if self._last is not None:
                continue
            how = self._end()
            if not self._begun and not how.startswith("signal"):
                raise WorkerError(
                    f"a new process ended before it could work ({how}): it imports the script that is run, which needs "
                    '`if __name__ == "__main__":` around the call, and cannot import what is typed or piped into python'
                )
            losses += 1
            self._start()
            if losses == _LOSSES:
                raise lost(losses, how)
            self._send()
        assert self._last is not None
        _, outcome = self._last
        self._last = _NOTHING
        return outcome.unpacked()

    def receive(self) -> bool:
        """Wait for one message; whether that was the answer, or the process is gone."""
        try:
            self._last = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self._last = None
            return True
        self._begun = True
        return self._answered

    @property
    def _answered(self) -> bool:
        return self._last is not None and self._last[0] == self._number

    def stop(self) -> None:
        """See `Worker`: it ends by itself when nothing more can be asked, unless it computes."""
        self.connection.close()
        self._end()

    def _end(self) -> str:
        """End the process, and say how it ended."""
        if self._process is None:
            return "not started"
        self._process.join(_PATIENCE)
        self._process.kill()
        self._process.join()
        code = self._process.exitcode or 0
        self._process.close()
        self._process = None
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
        self.connection, theirs = context.Pipe()
        self._begun = False
        self._last: tuple[int, Outcome] | None = _NOTHING  # message, None if the process is gone
        process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        process.start()
        self._process: SpawnProcess | None = process
        theirs.close()

    def _send(self) -> None:
        try:
            self.connection.send_bytes(self._request)
        except OSError:  # lost: `answer` sees it too
            return


def _serve(connection: Connection, file: Path, threads: int) -> None:
    """Say that it has begun, and answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    Thread(target=_end_with_parent, args=(file.parent,), daemon=True).start()
    sys.stdout = sys.stderr  # stdout is for the results of the process that asks
    warnings.simplefilter("ignore")  # that process has shown them
    torch.set_num_threads(threads)
    with suppress(OSError):
        connection.send_bytes(pickle.dumps(_NOTHING))
        made = Outcome.of(lambda: pickle.loads(file.read_bytes())())
        while True:
            try:
                number, request = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            connection.send_bytes(
                _pickled(number, made if made.answer is None else Outcome.of(partial(made.answer, request)))
            )


def _pickled(number: int, outcome: Outcome) -> bytes:
    try:
        return pickle.dumps((number, outcome))
    except Exception:
        return pickle.dumps((number, Outcome(failure=traceback.format_exc())))


def _end_with_parent(folder: Path) -> None:
    """Wait until the process that asks is gone, as when it is killed, and leave nothing of it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

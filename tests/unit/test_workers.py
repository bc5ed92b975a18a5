"""Workers in processes of this machine: answers, errors, and what is lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitquant.errors import CalibrationError, WorkerError
from vitquant.workers.opening import asked_workers, opened
from vitquant.workers.processes import Processes


def doubling() -> Any:
    return lambda request: 2 * request


def refusing() -> Any:
    raise CalibrationError("it is not there", "blocks.0")


def breaking(request: Any) -> Any:
    if request == "refuse":
        raise CalibrationError("it is not there", "blocks.0")
    if request == "unpicklable":
        return lambda: None
    if request == "exit":
        raise SystemExit(3)
    if request == "missing":
        return Path("/nowhere/at/all").read_text()
    return {"told": request}["asked"]


@dataclass(frozen=True)
class Dying:
    """Ends its process at the first requests."""

    file: Path
    times: int = 1

    def __call__(self) -> Any:
        return self.answer

    def answer(self, request: Any) -> Any:
        died = len(self.file.read_text()) if self.file.exists() else 0
        if died < self.times:
            self.file.write_text("x" * (died + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return request + 1


def test_workers_answer_at_the_same_time_and_end_with_the_context() -> None:
    with Processes.opened(2) as workers:
        started = [workers.start(doubling) for _ in range(workers.count)]
        for number, each in enumerate(started):
            each.ask(number)
        assert [each.answer() for each in started] == [0, 2]
        started[1].ask(torch.arange(3))
        first = workers.first(started)
        assert first is started[1]
        assert first.answer().tolist() == [0, 2, 4]
        processes = multiprocessing.active_children()
        assert len(processes) == 2
    assert not multiprocessing.active_children()


def test_a_tensor_is_kept_where_workers_read_it_and_removed_at_the_end() -> None:
    tensor = torch.randn(3000, 4).to(torch.bfloat16)[:3]
    with Processes.opened(1) as workers:
        kept = workers.keep(tensor)
        assert torch.equal(kept(), tensor)
        assert kept().untyped_storage().nbytes() == 24  # not all of what the tensor is a view of
        worker = workers.start(partial(partial, _sum, kept))
        worker.ask(10)
        assert worker.answer() == float(tensor.sum()) + 10
        folder = workers._folder
        assert folder.exists()
    assert not folder.exists()


def _sum(kept: Any, request: Any) -> float:
    return float(kept().sum()) + request


def test_errors_of_a_worker_are_raised_here_and_it_goes_on() -> None:
    with Processes.opened(1) as workers:
        worker = workers.start(partial(partial, breaking))
        worker.ask("refuse")
        with pytest.raises(CalibrationError, match=r"blocks\.0: it is not there"):
            worker.answer()
        worker.ask("other")
        with pytest.raises(RuntimeError, match=r"(?s)^KeyError: 'asked', in a worker:.*Traceback"):
            worker.answer()
        worker.ask("unpicklable")
        with pytest.raises(RuntimeError, match=r"pickle.*, in a worker:"):
            worker.answer()
        worker.ask("exit")
        with pytest.raises(RuntimeError, match="SystemExit: 3, in a worker:"):
            worker.answer()
        worker.ask("missing")
        with pytest.raises(FileNotFoundError) as missing:
            worker.answer()
        assert missing.value.filename == "/nowhere/at/all"
        unmade = workers.start(refusing)
        for _ in range(2):
            unmade.ask(0)
            with pytest.raises(CalibrationError, match=r"blocks\.0: it is not there"):
                unmade.answer()


def test_a_lost_worker_is_started_anew_and_asked_again(tmp_path: Path) -> None:
    with Processes.opened(1) as workers:
        worker = workers.start(Dying(tmp_path / "died"))
        worker.ask(1)
        assert worker.answer() == 2
        assert (tmp_path / "died").exists()
        for process in multiprocessing.active_children():  # between two requests
            process.kill()
            process.join()
        worker.ask(5)
        assert worker.answer() == 6


def test_a_worker_that_is_lost_again_and_again_is_an_error(tmp_path: Path) -> None:
    with Processes.opened(1) as workers:
        worker = workers.start(Dying(tmp_path / "died", times=3))
        worker.ask(1)
        with pytest.raises(WorkerError, match=r"lost 3 times at the same request \(signal 9\)"):
            worker.answer()
        for request in (10, 20):  # the answers are those of these requests
            worker.ask(request)
            assert workers.first([worker]) is worker
            assert worker.answer() == request + 1


def test_a_worker_that_is_lost_while_others_are_waited_for_is_the_first(tmp_path: Path) -> None:
    with Processes.opened(2) as workers:
        slow, dying = workers.start(partial(partial, _after)), workers.start(Dying(tmp_path / "died"))
        slow.ask(60.0)
        dying.ask(1)
        assert workers.first([slow, dying]) is dying
        assert dying.answer() == 2


def _after(seconds: float) -> None:
    time.sleep(seconds)


def test_workers_share_the_threads_of_this_process() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with Processes.opened(2) as workers:
            worker = workers.start(_threads)
            worker.ask(None)
            assert worker.answer() == 2
    finally:
        torch.set_num_threads(before)


def _threads() -> Any:
    return lambda _: torch.get_num_threads()


def test_ctrl_c_is_left_to_the_process_that_asks() -> None:
    with Processes.opened(1) as workers:
        worker = workers.start(doubling)
        worker.ask(1)
        assert worker.answer() == 2
        (process,) = multiprocessing.active_children()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.1)
        worker.ask(2)
        assert worker.answer() == 4
        assert multiprocessing.active_children() == [process]


@pytest.mark.parametrize("asked", ["rai", "", "-1", -1, 257, "1.5", 1.5, 2.0, None, True, "9" * 40, "0000000005", "٣"])
def test_what_is_no_number_of_workers_is_refused(asked: Any) -> None:
    with pytest.raises(WorkerError, match=r"workers = .*: it is a number of processes, 0 to 256, or ray"):
        opened(asked)


def test_what_is_asked_for() -> None:
    assert [asked_workers(each) for each in (0, "0", 3, "3", np.int64(3), "ray")] == [0, 0, 3, 3, 3, "ray"]  # type: ignore[arg-type]
    with opened("0") as none:
        assert none is None
    with opened(2) as two:
        assert isinstance(two, Processes)
        assert two.count == 2


SCRIPT = """
import sys
from vitquant.errors import WorkerError
from vitquant.workers.processes import Processes

def make():
    return int

try:
    with Processes.opened(1) as workers:
        worker = workers.start(make)
        worker.ask("3")
        print(worker.answer())
except WorkerError as error:
    print(error)
"""


@pytest.mark.parametrize("piped", [False, True])
def test_a_script_that_new_processes_cannot_import_is_told_so(tmp_path: Path, piped: bool) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = [sys.executable, *(["-"] if piped else [str(script)])]
    done = subprocess.run(words, input=SCRIPT if piped else "", capture_output=True, text=True, timeout=120)
    assert "a new process ended before it could work (exit code 1)" in done.stdout
    assert '`if __name__ == "__main__":` around the call' in done.stdout


KILLED = """
import sys, time
from vitquant.workers.processes import Processes

def make():
    return wait

def wait(seconds):
    print("waiting", flush=True)
    time.sleep(seconds)

if __name__ == "__main__":
    with Processes.opened(1) as workers:
        worker = workers.start(make)
        worker.ask(600)
        print(workers._folder, *(each._process.pid for each in workers._started), flush=True)
        worker.answer()
"""


def test_workers_of_a_killed_process_end_at_once_and_leave_nothing(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    words = [sys.executable, str(script)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        folder, pid = process.stdout.readline().split()
        assert "waiting" in process.stderr.readline()  # what a worker prints is not on stdout
        process.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (Path(f"/proc/{pid}").exists() or Path(folder).exists()):
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
    assert not Path(folder).exists()

"""Ends of a process at every moment at which the file system may differ."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_WRITERS = (str(Path("vitquant", "files")), str(Path("vitquant", "checkpoint.py")), shutil.__file__)


def contents(path: Path) -> dict[str, bytes] | bytes | None:
    """All that is at a path: bytes by name, or the bytes of a file, or None."""
    if path.is_dir():
        return {str(each.relative_to(path)): each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}
    return path.read_bytes() if path.exists() else None


def at_every_line(call: Callable[[], object], act: Callable[[int], None]) -> None:
    """Call a function, and another with its number before each line of what writes files."""
    number = 0

    def line(frame, event, _):
        nonlocal number
        if event == "line":
            act(number)
            number += 1
        return line

    def enter(frame, event, _):
        return line if any(each in frame.f_code.co_filename for each in _WRITERS) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(before)


def killed_at_every_change(call: Callable[[], object], folder: Path) -> Iterator[None]:
    """A process that is killed before each line of what writes files before which something in a folder has changed.

    The folder is as it was before each of them. Yields once a process is dead, and at last when the function was called
    to its end.
    """
    kept = folder.with_name(f"{folder.name}, kept")
    shutil.copytree(folder, kept)
    lines, states = [], []

    def note(line: int) -> None:
        state = _state(folder)
        if not states or state != states[-1]:
            lines.append(line)
            states.append(state)

    at_every_line(call, note)
    for number in lines:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        assert _killed(call, number)
        yield
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    shutil.rmtree(kept)
    call()
    yield


def _state(folder: Path) -> list[tuple[object, ...]]:
    found = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found.append((path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode))
    return found


def _killed(call: Callable[[], object], number: int) -> bool:
    """Call a function in a process that is killed before a line; False when it has come to its end."""
    child = os.fork()
    if child == 0:
        try:
            at_every_line(call, lambda line: os.kill(os.getpid(), signal.SIGKILL) if line == number else None)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

"""The claim of an output by one run at a time.

While OUT is written there is a hidden directory beside it, `.OUT.vitquant`. It holds a lock for as long as the run is
alive, the new content while it is written, and the old content after the exchange. A run that was killed leaves the
directory behind with the lock released: the next run for OUT restores the old content if it is missing, and removes the
rest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from vitquant.files.refusal import RefusedError

try:
    import fcntl
except ImportError:  # Windows, where the hidden directory itself is the lock
    fcntl = None

LOCK = "lock"
_LONGEST_NAME = 255  # bytes, on most file systems
_TRIES = 100  # a try fails only if another run ends at that moment
_held: set[int] = set()  # descriptors of this process's locks


def hidden_beside(target: Path) -> Path:
    """The hidden directory of an output."""
    name = f".{target.name}.vitquant"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()}.vitquant"
    return target.with_name(name)


def new_in(hidden: Path, target: Path) -> Path:
    """The path where the new content of an output is written."""
    return hidden / "new" / target.name


def old_in(hidden: Path, target: Path) -> Path:
    """The path of the old content for a moment, if the file system cannot exchange it with the new one."""
    return hidden / "old" / target.name


@contextmanager
def claimed(target: Path) -> Generator[Path]:
    """The hidden directory of an output, created or taken over from a killed run, and removed at the end.

    Raises:
        RefusedError: another run has it.
        OSError: it cannot be created.
    """
    hidden = hidden_beside(target)
    lock = _lock(hidden, target)
    try:
        _settle(hidden, target)
        yield hidden
    finally:
        if lock in _held:  # not in a forked child, whose parent continues
            try:
                with suppress(OSError, RefusedError):  # the next run removes what cannot be removed now
                    _settle(hidden, target)
            finally:
                _unlock(hidden, lock)


def refuse_if_alive(hidden: Path) -> None:
    """Refuse a hidden directory that belongs to a running process.

    Raises:
        RefusedError: the run is alive, or may be.
    """
    with suppress(FileNotFoundError):
        lock = os.open(hidden / LOCK, os.O_RDWR)
        try:
            free = _acquire(lock)
        finally:
            os.close(lock)
        if free is not True:
            raise RefusedError(f"{hidden} is of a run that writes in {hidden.parent}; wait until it ends")


def user() -> int:
    """The id of the user who owns the files that this process creates."""
    return os.geteuid() if hasattr(os, "geteuid") else 0


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    if os.name == "nt" and path.is_dir():  # directories cannot be opened on Windows
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settle(hidden: Path, target: Path) -> None:
    """Restore the old content if a run ended before the new content was in place, and remove the rest."""
    old = old_in(hidden, target)
    for name in ("new", "old"):
        if os.path.lexists(hidden / name) and not stat.S_ISDIR((hidden / name).lstat().st_mode):
            raise RefusedError(f"{hidden / name} is in the way and no run made it; remove {hidden}")
    if os.path.lexists(old) and (not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir()))):
        old.rename(target)
        sync(target.parent)
    for name in ("new", "old"):
        if os.path.lexists(hidden / name):
            shutil.rmtree(hidden / name)


def _lock(hidden: Path, target: Path) -> int:
    """Acquire the lock in a hidden directory, which is created if missing, and return its descriptor."""
    taken = RefusedError(f"another run is writing {target}; wait until it ends, or give another path")
    for _ in range(_TRIES):
        found = not _make(hidden)
        lock = -1
        try:
            lock = os.open(hidden / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            _held.add(lock)
            free = _acquire(lock)
            if free is False:
                raise taken
            if free is None and found:
                raise RefusedError(f"{hidden} is of another run, or of a killed one; remove it once none writes")
            if os.path.samestat(os.fstat(lock), (hidden / LOCK).stat()):
                return lock
        except FileNotFoundError:
            pass  # the run that held it has just ended
        except OSError as error:
            _close(lock)
            raise RefusedError(f"{hidden / LOCK} cannot be opened ({error.strerror}); remove {hidden}") from error
        except BaseException:
            _close(lock)
            raise
        _close(lock)
    raise taken


def _make(hidden: Path) -> bool:
    """Create a hidden directory; False if it exists already and belongs to the same user."""
    try:
        hidden.mkdir(mode=0o700)
    except FileExistsError:
        with suppress(FileNotFoundError):  # removed meanwhile: `_lock` tries again
            _refuse_what_is_not_ours(hidden)
        return False
    return True


def _refuse_what_is_not_ours(hidden: Path) -> None:
    found = hidden.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user():
        raise RefusedError(f"{hidden} is in the way and no run of yours made it; remove it")


def _acquire(lock: int) -> bool | None:
    """Try to acquire a lock, and return whether that succeeded; None if the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _unlock(hidden: Path, lock: int) -> None:
    if fcntl is None:  # on Windows an open file cannot be removed
        _close(lock)
    try:
        with suppress(OSError):
            (hidden / LOCK).unlink()  # while locked: else another run could acquire the lock and then lose it
            hidden.rmdir()
    finally:
        _close(lock)


def _close(lock: int) -> None:
    if lock in _held:
        _held.remove(lock)
        os.close(lock)


def _forget_locks() -> None:
    """Close inherited locks in a forked worker, which would otherwise keep them after its parent is killed."""
    for lock in tuple(_held):
        _close(lock)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)

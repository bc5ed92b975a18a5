"""An output is claimed by one run at a time.

While OUT is written there is a hidden directory beside it, `.OUT.vitquant`. A lock in it tells that the run is alive,
the new content grows in it, and the old content ends in it. A run that was killed leaves it behind with the lock free:
the next run for OUT puts back what is missing, and removes the rest.
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
except ImportError:  # Windows, where the hidden directory itself has to do as a lock
    fcntl = None

LOCK = "lock"
_LONGEST_NAME = 255  # bytes, on most file systems
_TRIES = 100  # each fails only when another run ends at that moment
_held: set[int] = set()  # descriptors of this process's locks


def hidden_beside(target: Path) -> Path:
    """The hidden directory of an output."""
    name = f".{target.name}.vitquant"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()}.vitquant"
    return target.with_name(name)


def new_in(hidden: Path, target: Path) -> Path:
    """Where the new content of an output grows."""
    return hidden / "new" / target.name


def old_in(hidden: Path, target: Path) -> Path:
    """Where the old content is for a moment, when it cannot be exchanged with the new one."""
    return hidden / "old" / target.name


@contextmanager
def claimed(target: Path) -> Generator[Path]:
    """The hidden directory of an output, made or taken over from a killed run; gone at the end.

    Raises:
        RefusedError: another run has it.
        OSError: it cannot be made.
    """
    hidden = hidden_beside(target)
    lock = _lock(hidden, target)
    try:
        _settle(hidden, target)
        yield hidden
    finally:
        if lock in _held:  # not in a forked child, where the parent goes on
            try:
                with suppress(OSError, RefusedError):  # what cannot be removed now is left to the next run
                    _settle(hidden, target)
            finally:
                _unlock(hidden, lock)


def refuse_if_alive(hidden: Path) -> None:
    """Refuse when a run has this hidden directory.

    Raises:
        RefusedError: it is alive, or that cannot be known.
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
    """The user that files belong to which this process makes."""
    return os.geteuid() if hasattr(os, "geteuid") else 0


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    if os.name == "nt" and path.is_dir():  # which cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settle(hidden: Path, target: Path) -> None:
    """Put the old content back where the end came before the new one was there, and remove the rest."""
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
    """The descriptor of the lock in a hidden directory, which is made unless it is there."""
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
            pass  # the run that had it ended just now
        except OSError as error:
            _close(lock)
            raise RefusedError(f"{hidden / LOCK} cannot be opened ({error.strerror}); remove {hidden}") from error
        except BaseException:
            _close(lock)
            raise
        _close(lock)
    raise taken


def _make(hidden: Path) -> bool:
    """Make a hidden directory; False when it is there, as of a run of the same user."""
    try:
        hidden.mkdir(mode=0o700)
    except FileExistsError:
        with suppress(FileNotFoundError):  # gone meanwhile: it is looked for once more
            _refuse_what_is_not_ours(hidden)
        return False
    return True


def _refuse_what_is_not_ours(hidden: Path) -> None:
    found = hidden.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != user():
        raise RefusedError(f"{hidden} is in the way and no run of yours made it; remove it")


def _acquire(lock: int) -> bool | None:
    """Whether a lock was free, and is now ours; None where the file system has no locks."""
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
    if fcntl is None:  # an open file cannot be removed there
        _close(lock)
    try:
        with suppress(OSError):
            (hidden / LOCK).unlink()  # before the lock is free: another run might take it, and then lose it
            hidden.rmdir()
    finally:
        _close(lock)


def _close(lock: int) -> None:
    if lock in _held:
        _held.remove(lock)
        os.close(lock)


def _forget_locks() -> None:
    """A worker is forked with the descriptors of its parent; it must not keep the locks when that is killed."""
    for lock in tuple(_held):
        _close(lock)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)

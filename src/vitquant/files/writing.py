"""Atomic writing of outputs; all outputs are written by these functions."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from vitquant.errors import ExportError, VitquantError
from vitquant.files.claim import LOCK, claimed, hidden_beside, new_in, old_in, sync
from vitquant.files.exchange import exchange
from vitquant.files.refusal import RefusedError, told_as
from vitquant.files.target import Directory, check, follow

_AT_ONCE = 32


@contextmanager
def replacing(path: str | Path, force: bool = False, directory: Directory | None = None) -> Generator[Path]:
    """A temporary path for the new content of an output, which is moved to its path atomically when the block ends.

    An output that cannot be written is refused before the block, so that long work belongs inside it. Until the block
    ends, and if it ends by an exception or the process is killed at any moment, the path keeps its old content. A block
    that writes nothing changes nothing. A link is followed, and remains a link.

    Arguments:
        path: of the output; parent directories are created when missing.
        force: replace existing content.
        directory: the kind of directory that the output is; None for a file.

    Yields:
        A path with the same name that does not exist yet.

    Raises:
        ExportError, or the error of `directory`: the path exists and `force` is false, is of another kind, or holds
            foreign files; another run is writing it; or the operating system refuses.
    """
    path, error = Path(path), ExportError if directory is None else directory.error
    with ExitStack() as held:
        with told_as(error, f"{path} cannot be written"):
            recover(path)
            target = follow(path)
            if not os.path.lexists(hidden_beside(target)):  # else the old content may have to be restored first
                check(path, target, force, directory)
            held.enter_context(_folders(target.parent))
            hidden = held.enter_context(claimed(target))
            check(path, target, force, directory)
            new = new_in(hidden, target)
            new.parent.mkdir()
        try:
            yield new
        except VitquantError as refusal:  # name the output and not its temporary path
            refusal.args = (str(refusal).replace(str(new), str(path)),)
            raise
        with told_as(error, f"{path} could not be written"):
            if os.path.lexists(new):
                _flush(new, hidden / LOCK)
                check(path, target, force, directory)
                _put(new, target, old_in(hidden, target), force)


def write_file(path: str | Path, content: bytes, force: bool = False) -> None:
    """Write a file atomically: it holds either all of its new content or the old content.

    Raises:
        ExportError: see `replacing`.
    """
    with replacing(path, force) as new, told_as(ExportError, f"{path} could not be written"):
        new.write_bytes(content)


def discard(new: Path) -> None:
    """Remove what was written in a block of `replacing`, so that the output is not changed."""
    if new.is_dir():
        shutil.rmtree(new)
    else:
        new.unlink(missing_ok=True)


def recover(path: str | Path) -> None:
    """Restore an output, or a directory above it, if a run was killed after moving the old content away.

    This can happen where the file system cannot exchange directories. Nothing else is changed.
    """
    with suppress(OSError, ValueError, RefusedError):
        path = Path(os.path.realpath(path))
        for target in (path, *path.parents):
            if not os.path.lexists(target) and old_in(hidden_beside(target), target).exists():
                with claimed(target):
                    pass


def identity(path: str | Path) -> tuple[int, int] | None:
    """Device and inode of a path, which change when the content is replaced; None where there is nothing."""
    with suppress(OSError, ValueError):
        found = Path(path).stat()
        return found.st_dev, found.st_ino
    return None


@contextmanager
def _folders(parent: Path) -> Generator[None]:
    """Create a directory and its parents; those that were created and are still empty are removed at the end."""
    missing = [each for each in (parent, *parent.parents) if not each.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for each in missing:
            sync(each.parent)
        yield
    finally:
        for each in missing:
            with suppress(OSError):
                each.rmdir()


def _flush(new: Path, lock: Path) -> None:
    """Flush everything to the disk, with the mode of ordinary new files, since some libraries create private ones."""
    mode = stat.S_IMODE(lock.stat().st_mode)
    content = [*new.rglob("*"), new]
    for each in content:
        if each.is_file():
            each.chmod(mode)
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # many in parallel take about the time of one
        for _ in pool.map(sync, content):
            pass


def _put(new: Path, target: Path, old: Path, force: bool) -> None:
    """Move the new content to its path; old content is in the hidden directory afterwards."""
    if new.is_dir():
        if not target.exists():
            new.rename(target)
        elif not exchange(new, target):
            old.parent.mkdir()
            target.rename(old)  # if the run ends here, `_settle` restores the old content
            new.rename(target)
    elif force:
        new.replace(target)
    else:
        _put_new_file(new, target)
    sync(target.parent)


def _put_new_file(new: Path, target: Path) -> None:
    """Move a new file to its path by a hard link, which unlike a rename never replaces another program's file."""
    try:
        target.hardlink_to(new)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        new.rename(target)

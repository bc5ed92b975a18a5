"""The one way in which outputs are written."""

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
    """A place for the new content of an output; it is put at its path, in one step, when the block ends.

    What cannot be written is refused before the block, so long work belongs inside it. Until the block ends, and when
    it ends by an exception or the process is killed at any moment, the path holds what it held before. A block that
    writes nothing changes nothing. A link is followed, and stays a link.

    Arguments:
        path: of the output; directories above it are made when missing.
        force: replace what is there.
        directory: the kind of directory that the output is; None for a file.

    Yields:
        a path with the same name, where nothing is yet.

    Raises:
        ExportError, or the kind's own error: it is there and not `force`, is of another kind, or holds what is not of
            its kind; another run is writing it; the operating system refuses.
    """
    path, error = Path(path), ExportError if directory is None else directory.error
    with ExitStack() as held:
        with told_as(error, f"{path} cannot be written"):
            recover(path)
            target = follow(path)
            if not os.path.lexists(hidden_beside(target)):  # else something may have to be put back first
                check(path, target, force, directory)
            held.enter_context(_folders(target.parent))
            hidden = held.enter_context(claimed(target))
            check(path, target, force, directory)
            new = new_in(hidden, target)
            new.parent.mkdir()
        try:
            yield new
        except VitquantError as refusal:  # it is about the output, not about where that is meanwhile
            refusal.args = (str(refusal).replace(str(new), str(path)),)
            raise
        with told_as(error, f"{path} could not be written"):
            if os.path.lexists(new):
                _flush(new, hidden / LOCK)
                check(path, target, force, directory)
                _put(new, target, old_in(hidden, target), force)


def write_file(path: str | Path, content: bytes, force: bool = False) -> None:
    """Write a file so that it holds either all of its content or what it held before.

    Raises:
        ExportError: see `replacing`.
    """
    with replacing(path, force) as new, told_as(ExportError, f"{path} could not be written"):
        new.write_bytes(content)


def discard(new: Path) -> None:
    """Remove what was written in a block of `replacing`, so that nothing changes."""
    if new.is_dir():
        shutil.rmtree(new)
    else:
        new.unlink(missing_ok=True)


def recover(path: str | Path) -> None:
    """Put an output back, or a directory above it, when a run was killed as it was neither old nor new.

    That happens where a file system cannot exchange directories. Nothing else is touched.
    """
    with suppress(OSError, ValueError, RefusedError):
        path = Path(os.path.realpath(path))
        for target in (path, *path.parents):
            if not os.path.lexists(target) and old_in(hidden_beside(target), target).exists():
                with claimed(target):
                    pass


def identity(path: str | Path) -> tuple[int, int] | None:
    """What tells the content of a path from another that takes its place; None where nothing is."""
    with suppress(OSError, ValueError):
        found = Path(path).stat()
        return found.st_dev, found.st_ino
    return None


@contextmanager
def _folders(parent: Path) -> Generator[None]:
    """A directory with those above it; of those that are made, the ones that stay empty are removed at the end."""
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
    """Bring everything to the disk, with the mode that files are made with here: libraries make private ones."""
    mode = stat.S_IMODE(lock.stat().st_mode)
    content = [*new.rglob("*"), new]
    for each in content:
        if each.is_file():
            each.chmod(mode)
    with ThreadPoolExecutor(_AT_ONCE) as pool:  # a disk takes many together in about the time of one
        for _ in pool.map(sync, content):
            pass


def _put(new: Path, target: Path, old: Path, force: bool) -> None:
    """The one step; what was there is in the hidden directory after it."""
    if new.is_dir():
        if not target.exists():
            new.rename(target)
        elif not exchange(new, target):
            old.parent.mkdir()
            target.rename(old)  # an end between the two is mended when the claim ends, or by the next one
            new.rename(target)
    elif force:
        new.replace(target)
    else:
        _put_new_file(new, target)
    sync(target.parent)


def _put_new_file(new: Path, target: Path) -> None:
    """By a link, which never replaces what another program has written meanwhile, as renaming would."""
    try:
        target.hardlink_to(new)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        new.rename(target)

"""Checks of an output's path and of what may be replaced there, made before long work and again at its end."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vitquant.errors import ExportError, VitquantError
from vitquant.files.claim import hidden_beside, refuse_if_alive, user
from vitquant.files.refusal import RefusedError

Layout = Mapping[str, "Layout | None"]  # the names in a directory: of files with None, of directories with a layout

_SYSTEM = (".DS_Store", "Thumbs.db", "desktop.ini")  # files that file managers leave in directories
_NO_FILES = ("/dev", "/proc", "/sys")


@dataclass(frozen=True)
class Directory:
    """A kind of directory that is written as one.

    Arguments:
        name: of the kind, such as "saved model".
        layout: its possible content; a directory that holds anything else is never replaced.
        recognize: whether a directory that is not empty is of this kind.
        error: the type of the error if it cannot be written.
    """

    name: str
    layout: Layout
    recognize: Callable[[Path], bool]
    error: type[VitquantError] = ExportError


def follow(path: Path) -> Path:
    """The absolute path after links are followed.

    Raises:
        RefusedError: no output can be written there.
        OSError, ValueError: the operating system rejects the path.
    """
    named = Path(os.path.abspath(path))  # noqa: PTH100  without following links: /dev/stdout is one, to a user's file
    if any(named.is_relative_to(folder) for folder in _NO_FILES) and not named.is_relative_to("/dev/shm"):
        raise RefusedError(f"{path} is no place for files; give another path")
    for each in (path, *path.parents):
        if each.is_symlink() and not each.exists():
            raise RefusedError(f"{each} is a link to what is not there; make that, or give another path")
        if each.name == ".." and not each.parent.is_dir():  # realpath ignores this, but opening the path fails
            raise RefusedError(f"{each.parent} is no directory, so that {path} names nothing; give another path")
    target = Path(os.path.realpath(path))
    if target == target.parent:
        raise RefusedError(f"{path} is the root of the file system; give another path")
    longest = os.pathconf("/", "PC_PATH_MAX") // 2 if hasattr(os, "pathconf") else 130  # hidden paths are longer
    if len(os.fsencode(target)) > longest:
        raise RefusedError(f"{str(path)[:40]}... has more than {longest} bytes as a path; give a shorter one")
    return target


def check(path: Path, target: Path, force: bool, directory: Directory | None) -> None:
    """Refuse an output if the existing content must not or cannot be replaced.

    Arguments:
        path: as the user gave it.
        target: the path after links are followed.
        force, directory: as for `replacing`.

    Raises:
        RefusedError: it must not or cannot be replaced; the message says why.
        OSError: the path cannot be read.
    """
    try:
        found = target.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode) and not stat.S_ISREG(found.st_mode):
        raise RefusedError(f"{path} is neither a file nor a directory; give another path")
    if _is_mounted(target):
        raise RefusedError(f"{path} is a mount point, which cannot be replaced; give a path in it")
    parent = target.parent.stat()
    if parent.st_mode & stat.S_ISVTX and user() not in (0, parent.st_uid, found.st_uid):
        raise RefusedError(f"{path} belongs to another user; give another path")
    if directory is not None:
        _check_directory(path, target, force, directory)
    elif stat.S_ISDIR(found.st_mode):
        raise RefusedError(f"{path} is a directory; give the name of a file")
    elif not force:
        raise RefusedError(f"{path} exists; give another path, or --force (force=True) to replace it")


def _check_directory(path: Path, target: Path, force: bool, directory: Directory) -> None:
    if not target.is_dir():
        raise RefusedError(f"{path} is a file; give a directory")
    here = Path(os.path.realpath(Path.cwd()))
    if target in (here, *here.parents):
        raise RefusedError(f"{path} is the current directory or holds it; give the name of a directory to make")
    if not any(target.iterdir()):
        return
    if not force:
        raise RefusedError(f"{path} is not empty; give another directory, or --force (force=True) to replace it")
    if not directory.recognize(target):
        raise RefusedError(f"{path} is not empty and holds no {directory.name}; remove it yourself")
    for each in _foreign(target, directory.layout):
        raise RefusedError(
            f"{path} holds {each.relative_to(target)}, which is not of a {directory.name} and would be lost; "
            "move it, or give another directory"
        )


def _foreign(directory: Path, layout: Layout) -> Iterator[Path]:
    """The entries of a directory that are not in its layout."""
    if not os.access(directory, os.W_OK | os.X_OK):
        raise RefusedError(f"{directory} cannot be written; give another directory")
    hidden = {hidden_beside(directory / name).name for name in layout}
    for each in sorted(directory.iterdir()):
        if each.name in hidden:
            refuse_if_alive(each)  # what a killed run left is replaced with the rest
        elif each.name not in layout:
            if each.name not in _SYSTEM:
                yield each
        elif (below := layout[each.name]) is None:
            if not each.is_file():
                yield each
        elif each.is_dir() and not each.is_symlink():
            yield from _foreign(each, below)
        else:
            yield each


def _is_mounted(target: Path) -> bool:
    """Whether a path is a mount point, including bind mounts of the same file system."""
    if target.is_mount():
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    escaped = os.fsencode(target)
    for character in b"\\", b" ", b"\t", b"\n":  # as the kernel writes them
        escaped = escaped.replace(character, b"\\%03o" % ord(character))
    return any(mount.split(b" ")[4] == escaped for mount in mounts)

"""Files and directories that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from vitquant.errors import ExportError


def check_new_file(path: Path, force: bool = False) -> None:
    """Refuse a file that cannot be written, before long work rather than after.

    Arguments:
        path: where the file will be.
        force: allow to replace a file that is there.

    Raises:
        ExportError: it exists and not `force`, is a directory, or its parent cannot be written.
    """
    path = path.absolute()
    if path.is_dir():
        raise ExportError(f"{path} is a directory; give the name of a file")
    if path.exists() and not force:
        raise ExportError(f"{path} exists; give another path, or --force (force=True) to replace it")
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(f"{parent} cannot be written; give another path")


def write_file(path: Path, content: bytes, force: bool = False) -> None:
    """Write a file so that it holds either all of its content or what it held before.

    Raises:
        ExportError: see `check_new_file`; or the disk refuses.
    """
    path = path.absolute()
    check_new_file(path, force)
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        share(Path(partial))
        Path(partial).replace(path)
    except OSError as error:
        raise ExportError(f"{path} could not be written: {error.strerror}") from error
    finally:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)


def share(new: Path) -> None:
    """Give a new file, or a directory and the files in it, the mode that the umask gives; tempfile's are private."""
    umask = os.umask(0o077)  # it cannot be read otherwise
    os.umask(umask)
    for path in (new, *(new.iterdir() if new.is_dir() else ())):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def put_in_place(new: Path, target: Path) -> None:
    """Rename a file or a directory; what was at the target is there until the very moment, and then gone.

    Arguments:
        new: on the file system of the target.
    """
    if not target.is_dir():
        new.replace(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(old / target.name)
    try:
        new.rename(target)
    except BaseException:  # an interrupt among them: what was there comes back
        if not target.exists():
            (old / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

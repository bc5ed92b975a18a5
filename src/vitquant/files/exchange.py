"""Atomic exchange of two paths by the file system."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_HERE = -100  # AT_FDCWD: a relative path starts at the current directory
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
# The kernel is too old, the file system cannot (NFS, FAT), or a container forbids unknown system calls.
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two paths of one file system atomically, so that both exist at any time.

    Returns:
        Whether they were exchanged; False, without a change, where this is not supported.

    Raises:
        OSError: it is supported, and failed.
    """
    if not sys.platform.startswith(("linux", "darwin")):
        return False
    library, paths = ctypes.CDLL(None, use_errno=True), (os.fsencode(one), os.fsencode(other))
    try:
        if sys.platform == "darwin":
            failed = library.renamex_np(*paths, ctypes.c_uint(_EXCHANGE))
        else:
            failed = library.renameat2(_HERE, paths[0], _HERE, paths[1], ctypes.c_uint(_EXCHANGE))
    except AttributeError:  # a C library without it
        return False
    if failed and ctypes.get_errno() not in _UNSUPPORTED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    return not failed

"""Atomic outputs: files and directories that are written as a whole or not at all, by one run at a time."""

from vitquant.files.digest import sha256
from vitquant.files.target import Directory, Layout
from vitquant.files.writing import discard, identity, recover, replacing, write_file

__all__ = ["Directory", "Layout", "discard", "identity", "recover", "replacing", "sha256", "write_file"]

"""Outputs: files and directories that are written whole or not at all, by one run at a time."""

from vitquant.files.replacing import discard, identity, recover, replacing, write_file
from vitquant.files.target import Directory, Layout

__all__ = ["Directory", "Layout", "discard", "identity", "recover", "replacing", "write_file"]

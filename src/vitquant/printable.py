"""Texts that come from anywhere, as a terminal can show them."""

from __future__ import annotations


def one_line(text: str) -> str:
    """A text as one line of printable characters; others, which may come from a file's name, are escaped."""
    line = " ".join(text.split())
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)

"""Untrusted texts in a form that is safe to show in a terminal."""

from __future__ import annotations


def one_line(text: str) -> str:
    """A text as one line of printable characters; other characters, as in file names, are escaped."""
    line = " ".join(text.split())
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)

"""How wide what is printed is, where the environment says it; it imports next to nothing, as `streams`."""

from __future__ import annotations

import os

LEAST = 40  # columns; in fewer a table loses some of its own
_MOST = 10_000
_VARIABLES = ("COLUMNS", "TERMINAL_WIDTH")  # rich reads the first, and typer the second as it is imported


def forget_senseless_widths() -> None:
    """Remove widths from the environment in which nothing could be read: then it is as if none were given."""
    for name in _VARIABLES:
        text = os.environ.get(name, "")
        if not (text.isascii() and text.isdigit() and len(text) < 10 and LEAST <= int(text) <= _MOST):
            os.environ.pop(name, None)

"""The width of the output in the environment; like `streams`, this module imports little."""

from __future__ import annotations

import os

LEAST = 40  # characters; narrower tables would lose columns
_MOST = 10_000
_VARIABLES = ("COLUMNS", "TERMINAL_WIDTH")  # rich reads the first, and typer the second when it is imported


def forget_senseless_widths() -> None:
    """Remove unusable widths from the environment, so that the defaults apply."""
    for name in _VARIABLES:
        text = os.environ.get(name, "")
        if not (text.isascii() and text.isdigit() and len(text) < 10 and LEAST <= int(text) <= _MOST):
            os.environ.pop(name, None)

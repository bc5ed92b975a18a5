"""The command line: the only place that turns names into objects.

Importing it costs typer and rich; torch is imported by the commands that need it.
"""

from vitquant.cli.main import main

__all__ = ["main"]

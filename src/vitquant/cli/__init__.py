"""The command line: the only place that turns names into objects.

Importing it costs next to nothing: `main` imports typer and rich, and torch is imported by the commands that need it.
"""

from vitquant.cli.main import main

__all__ = ["main"]

"""The command line, the only place that turns names of models, recipes and files into objects.

Importing it is cheap: `main` imports typer and rich when it is called, and commands import torch if they need it.
"""

from vitquant.cli.main import main

__all__ = ["main"]

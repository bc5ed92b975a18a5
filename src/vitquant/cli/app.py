"""The commands, and what typer makes of the words of a command line."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from vitquant import __version__
from vitquant.cli.allocate import allocate
from vitquant.cli.demo import demo
from vitquant.cli.evaluate import evaluate
from vitquant.cli.export import export
from vitquant.cli.inspect import inspect
from vitquant.cli.interrupts import INTERRUPTED
from vitquant.cli.parity import parity
from vitquant.cli.quantize import quantize
from vitquant.cli.recipes import recipes
from vitquant.cli.resize import resize
from vitquant.cli.sensitivity import sensitivity
from vitquant.cli.vectors import vectors
from vitquant.errors import VitquantError

_WRONG = 2
# Typer brings a copy of click or uses the installed one, by its version; this is the family of its own errors.
_UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="vitquant", pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
for command in (quantize, evaluate, inspect, export, parity, sensitivity, allocate, resize, recipes, demo, vectors):
    app.command()(command)


class UsageError(VitquantError):
    """A command line that is not understood."""


def run(words: Sequence[str]) -> int:
    """Run one command, and return its exit code.

    Raises:
        VitquantError: a request that cannot be met, or a command line that is not understood.
        KeyboardInterrupt: it was interrupted.
    """
    _refuse_empty(words)
    try:
        with _silence("--debug" in words):
            code = app(list(words), prog_name="vitquant", standalone_mode=False)
    except typer.Abort as abort:
        raise KeyboardInterrupt from abort
    except _UsageError as error:
        where = error.ctx.command_path if error.ctx else "vitquant"
        raise UsageError(f"{' '.join(error.format_message().split())} See {where} --help") from None
    if code == INTERRUPTED:  # what typer makes of an interrupt
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Quantize unmodified Vision Transformers by published recipes.

    Exit codes: 0 done, 1 a fault of vitquant or a broken promise, 2 a request that cannot be met, 130 interrupted.
    """
    if version:
        print(f"vitquant {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(_WRONG)


def _refuse_empty(words: Sequence[str]) -> None:
    """Refuse an empty string, mostly a variable of the shell that is not set: as a path it would be this directory.

    Raises:
        UsageError: it names what came before.
    """
    for before, word in zip(["vitquant", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if not word or (name.startswith("--") and equals and not value):
            raise UsageError(f"an empty string after {name or before}: give a value; . is the current directory")


@contextmanager
def _silence(debug: bool) -> Generator[None]:
    """Libraries warn about what a user of this command cannot change."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)

"""The typer application with all commands, and running a command line with it."""

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
from vitquant.cli.landscape import landscape
from vitquant.cli.parity import parity
from vitquant.cli.quantize import quantize
from vitquant.cli.recipes import recipes
from vitquant.cli.resize import resize
from vitquant.cli.sensitivity import sensitivity
from vitquant.cli.sweep import sweep
from vitquant.cli.synthesize import synthesize
from vitquant.cli.vectors import vectors
from vitquant.errors import VitquantError

_WRONG = 2
# The base class of usage errors, from the copy of click that typer ships or the installed one, by typer's version.
_UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="vitquant", pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
for command in (
    quantize,
    evaluate,
    inspect,
    export,
    parity,
    sensitivity,
    allocate,
    landscape,
    synthesize,
    sweep,
    resize,
    recipes,
    demo,
    vectors,
):
    app.command()(command)


class UsageError(VitquantError):
    """A command line that cannot be parsed."""


def run(words: Sequence[str]) -> int:
    """Run one command, and return its exit code.

    Raises:
        VitquantError: the request cannot be met, or the command line cannot be parsed.
        KeyboardInterrupt: the command was interrupted.
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
    if code == INTERRUPTED:  # typer returns this code for an interrupt
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
    """Refuse empty strings, usually from unset shell variables, which as a path would mean the current directory.

    Raises:
        UsageError: a word is empty; the message names the word before it.
    """
    for before, word in zip(["vitquant", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if not word or (name.startswith("--") and equals and not value):
            raise UsageError(f"an empty string after {name or before}: give a value; . is the current directory")


@contextmanager
def _silence(debug: bool) -> Generator[None]:
    """Silence warnings of libraries, which a user of the command line cannot act on, unless debugging."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        if not debug:
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)

"""The entry point: commands, and what becomes of errors."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from vitquant import __version__
from vitquant.cli.allocate import allocate
from vitquant.cli.demo import demo
from vitquant.cli.evaluate import evaluate
from vitquant.cli.export import export
from vitquant.cli.inspect import inspect
from vitquant.cli.parity import parity
from vitquant.cli.quantize import quantize
from vitquant.cli.recipes import recipes
from vitquant.cli.sensitivity import sensitivity
from vitquant.cli.terminal import InterruptedAfterWritingError
from vitquant.errors import VitquantError

OK, INTERNAL, WRONG, INTERRUPTED = 0, 1, 2, 130

# Typer brings a copy of click or uses the installed one, by its version; this is the family of its own errors.
_UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(name="vitquant", add_completion=False, pretty_exceptions_enable=False)
for command in (quantize, evaluate, inspect, export, parity, sensitivity, allocate, recipes, demo):
    app.command()(command)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Quantize unmodified Vision Transformers by published recipes.

    Exit codes: 0 done, 1 a fault of vitquant or a broken promise, 2 a request that cannot be met, 130 interrupted.
    """
    if version:
        typer.echo(f"vitquant {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(WRONG)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code.

    Arguments:
        arguments: the words after `vitquant`; those of this process when None.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in words
    try:
        with _sigterm_as_interrupt(), _silence(debug):
            code = app(words, prog_name="vitquant", standalone_mode=False)
            if code == INTERRUPTED:  # what typer makes of an interrupt
                raise KeyboardInterrupt
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has enough
        _discard_stdout()
        code = OK
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        code, message = _explain(error)
        print(message, file=sys.stderr)
        if _is_full(error):
            _discard_stdout()
    sys.exit(code if isinstance(code, int) else OK)


def _discard_stdout() -> None:
    """What is still in the buffer would be written, and fail, once more at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_full(error: BaseException) -> bool:
    """Whether stdout goes to a disk that is full; files that vitquant writes have errors of their own for that."""
    return isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None


def _explain(error: BaseException) -> tuple[int, str]:
    """The exit code for an error, and the one line that says it."""
    text = " ".join(str(error).split())
    if isinstance(error, InterruptedAfterWritingError):
        return INTERRUPTED, text
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED, "interrupted; nothing was written"
    if _is_full(error):
        return WRONG, "error: the result cannot be written: no space left where stdout goes"
    if isinstance(error, VitquantError):
        return WRONG, f"error: {text}"
    if isinstance(error, _UsageError):
        usage: Any = error
        where = usage.ctx.command_path if usage.ctx else "vitquant"
        return WRONG, f"error: {' '.join(usage.format_message().split())} See {where} --help"
    return INTERNAL, f"internal error: {type(error).__name__}: {text[:200]}; run with --debug"


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """What a batch system sends before it kills ends a run as Ctrl-C does."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _silence(debug: bool) -> Iterator[None]:
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

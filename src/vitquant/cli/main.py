"""The entry point, with the handling of errors, interrupts, and streams that are closed or full.

Modules that take long to import are imported inside of its `try`, so that interrupts are handled meanwhile.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vitquant.cli.interrupts import INTERRUPTED, InterruptedAfterWritingError, Interrupts
from vitquant.cli.streams import Streams
from vitquant.cli.widths import forget_senseless_widths
from vitquant.errors import VitquantError
from vitquant.printable import one_line

OK, INTERNAL, WRONG = 0, 1, 2  # exit codes, beside INTERRUPTED


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code.

    Arguments:
        arguments: the words after `vitquant`; those of this process when None.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    forget_senseless_widths()
    with Streams() as streams, Interrupts(last=arguments is None) as interrupts:
        try:
            try:
                from vitquant.cli.app import run

                code = run(words)
            except (Exception, KeyboardInterrupt) as error:
                if "--debug" in words:
                    _show_traceback()
                code, message = _explain(error, interrupts.came)
                print(message, file=sys.stderr)
            streams.stdout.flush()
            if streams.stdout.lost:
                print(f"error: the result cannot be written to stdout: {streams.stdout.lost}", file=sys.stderr)
                code = code or WRONG
        except KeyboardInterrupt:  # during the output above
            code = INTERRUPTED
    sys.exit(code)


def _explain(error: BaseException, interrupted: bool) -> tuple[int, str]:
    """The exit code for an error, and its one-line message."""
    text = one_line(str(error))
    if isinstance(error, InterruptedAfterWritingError):
        return INTERRUPTED, text
    if interrupted or isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; nothing was written"
    if isinstance(error, VitquantError):
        return WRONG, f"error: {text}"
    if isinstance(error, OSError) and isinstance(error.filename, str | bytes):  # such as a directory without permission
        return WRONG, one_line(f"error: {os.fsdecode(error.filename)}: {error.strerror}")
    return INTERNAL, f"internal error: {type(error).__name__}: {text[:200]}; run with --debug"


def _show_traceback() -> None:
    import traceback

    traceback.print_exc()

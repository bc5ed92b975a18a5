"""`vitquant vectors`: conformance vectors to test other engines with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitquant.cli import options
from vitquant.cli.terminal import Terminal

Output = Annotated[Path, typer.Argument(metavar="DIR", help="The directory to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace vectors that are there.")]


def vectors(
    directory: Output,
    force: Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Write small integer programs with inputs and expected outputs, which every engine of the format must reproduce.

    docs/program-format.md says what programs are and how to read the files.
    """
    with Terminal(json, quiet) as terminal:
        with terminal.progress("loading"):
            from vitquant.conformance.vectors import all_vectors, directory_of, index, write_into
            from vitquant.report.tables import facts

            found = all_vectors()
        with terminal.replacing(directory, force, directory_of(found)) as new, terminal.progress("writing"):
            write_into(new, found)
        rows = {"vectors": str(len(found)), "written to": str(directory)}
        terminal.result({"directory": str(directory), **index(found)}, facts(rows))

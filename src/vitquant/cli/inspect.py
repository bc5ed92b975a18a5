"""`vitquant inspect`: the arithmetic of every operation, or the integer program line by line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vitquant.cli import options
from vitquant.cli.terminal import Terminal
from vitquant.errors import LoweringError


def inspect(
    out: options.Saved,
    model: options.Repeated = None,
    model_arguments: options.RepeatedArguments = None,
    every: Annotated[bool, typer.Option("--all", help="List also what only moves data or is constant.")] = False,
    program: Annotated[
        bool,
        typer.Option("--program", help="List the integer program's instructions instead; OUT may be a program's file."),
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show every operation of a quantized model: integer or float and why, bits, scheme, scales, accumulators."""
    with Terminal(json, quiet) as terminal:
        if program:
            _show_program(terminal, out, options.repeated(model, model_arguments))
            return
        with terminal.progress("loading"):
            from vitquant.engines import program_of
            from vitquant.loading import load
            from vitquant.report.operations import CONSTANT, DATA, list_operations, summarize
            from vitquant.report.tables import facts, operations_table, summary_text

            quantized = load(out, **options.repeated(model, model_arguments))
            lowered, refused = program_of(quantized)
            operations = list_operations(quantized, lowered)
        source = (quantized.provenance.get("source") or {}).get("name")
        summary = summarize(operations)
        about = {
            "model": source,
            "recipe": quantized.recipe.name,
            "bits": str(quantized.bits),
            "engine": "simulated" if lowered is None else "integer",
            "not_lowered": refused or None,
            "summary": summary,
            "operations": [operation.to_dict() for operation in operations],
        }
        shown = [operation for operation in operations if every or operation.arithmetic not in (CONSTANT, DATA)]
        rows = {
            "model": source or "given in Python",
            "recipe": f"{quantized.recipe.name}, {quantized.bits}",
            "summary": summary_text(summary),
            "integer program": f"none: {refused}" if refused else "every operation; vitquant evaluate runs it",
        }
        if len(shown) < len(operations):
            rows["not shown"] = f"{len(operations) - len(shown)} that move data or are constant: --all or --json"
        terminal.result(about, operations_table(shown), facts(rows))


def _show_program(terminal: Terminal, out: Path, repeated: dict[str, Any]) -> None:
    """Print the lines of a saved model's program, or of a program's file."""
    with terminal.progress("loading"):
        from vitquant.engines import program_of
        from vitquant.loading import load
        from vitquant.program.storage import load_program, plain
        from vitquant.program.text import text_form
        from vitquant.report.register_scales import register_scales

        if os.path.isfile(out):
            program, scales = load_program(out), {}
        else:
            quantized = load(out, **repeated)
            program, refused = program_of(quantized)
            if program is None:
                raise LoweringError(f"{out} has no integer program: {refused}")
            scales = register_scales(quantized, program)
        lines = text_form(program, scales)
    terminal.result({"program": plain(program), "text": lines}, *lines)

"""A parity report as tables and as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from vitquant.parity import RESCALING, Comparison, Flips, ParityReport

_SHOWN = 10
_FORM, _PROMISE = 21, 17  # widths in characters, which keep `bit for bit: kept` on one line


def as_dict(report: ParityReport) -> dict[str, Any]:
    """Plain values for JSON."""
    flips = [{**asdict(each), "share": each.share, "kept": each.kept} for each in report.flips]
    return {
        "comparisons": [_finite(asdict(each)) for each in report.comparisons],
        "flips": flips,
        "not_lowered": report.refused or None,
        "broken": report.broken,
    }


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """The values with None in place of NaN and infinity, which JSON cannot represent."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def comparisons_table(comparisons: Iterable[Comparison]) -> Table:
    """One line for each comparison, grouped by the reference form; no word is broken in 80 columns."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold underline")
    table.add_column("form", min_width=_FORM)
    comparisons = list(comparisons)
    answers = any(each.agreement is not None for each in comparisons)
    for header in ("images", *(["% same\nclass"] if answers else []), "% same\nbits", "cosine", "worst\ndiff."):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("promise", min_width=_PROMISE)
    for beside, pairs in _by_reference(comparisons).items():
        table.add_row(Text(f"beside {beside}:", style="bold"))
        for each in pairs:
            table.add_row(
                Text(each.form),
                str(each.images),
                *([_agreement(each)] if answers else []),
                f"{each.identical:.1f}",
                f"{each.cosine:.6f}",
                f"{each.worst:.3g}",
                _kept(each.promise, each.kept),
            )
    return table


def _agreement(each: Comparison) -> str:
    return "" if each.agreement is None else f"{each.agreement:.1f}"


def _by_reference(comparisons: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    found: dict[str, list[Comparison]] = {}
    for each in comparisons:
        found.setdefault(each.beside, []).append(each)
    return found


def flips_table(flips: Sequence[Flips]) -> Table:
    """The flipped codes in total for each kind of operation, and those of the worst sites."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold underline")
    table.add_column("codes of", overflow="fold", style="bold")
    table.add_column("made by")
    for header in ("codes", "flipped", "share", "by up to"):
        table.add_column(header, justify="right", no_wrap=True)
    for made_by in sorted({each.made_by for each in flips}, key=lambda kind: (kind != RESCALING, kind)):
        of_kind = [each for each in flips if each.made_by == made_by]
        codes, flipped = sum(each.codes for each in of_kind), sum(each.flipped for each in of_kind)
        whole = Flips(f"all {len(of_kind)}", made_by, codes, flipped, max(each.largest for each in of_kind))
        table.add_row(*_flips_row(whole))
    worst = sorted((each for each in flips if each.flipped), key=lambda each: each.share, reverse=True)
    for each in worst[:_SHOWN]:
        table.add_row(*_flips_row(each))
    return table


def verdict(report: ParityReport) -> Text:
    """Whether all criteria are met, in one line, after a line on why there is no integer program, if so."""
    said = f"not lowered: {report.refused}\n" if report.refused else ""
    if report.broken:
        return Text.assemble(said, ("broken: ", "bold red"), "; ".join(report.broken))
    if not report.promised:
        return Text.assemble(said, "nothing was promised")
    return Text.assemble(said, ("every promise is kept", "green"))


def _flips_row(each: Flips) -> tuple[str, ...]:
    return each.value, each.made_by, f"{each.codes:,}", f"{each.flipped:,}", f"{each.share:.1e}", str(each.largest)


def _kept(promise: str, kept: bool) -> Text:
    if not promise:
        return Text("")
    return Text.assemble(promise, (": kept", "green") if kept else (": broken", "bold red"))

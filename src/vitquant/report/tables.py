"""Results as tables for a terminal; in a narrow terminal they are folded and never cut."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, assert_never

from rich.table import Table
from rich.text import Text

from vitquant.allocation.measure import Sensitivity
from vitquant.graph.outputs import ONLY
from vitquant.loss_landscape.jaggedness import jaggedness
from vitquant.loss_landscape.table import Landscape
from vitquant.model import QuantizedModel
from vitquant.printable import one_line
from vitquant.recipe import Choice, Recipe
from vitquant.report.operations import CONSTANT, DATA, FLOAT, FUSED, INTEGER, Operand, Operation
from vitquant.sweep import Row
from vitquant.tasks.classification import ClassificationResult
from vitquant.tasks.features import FeaturesResult
from vitquant.tasks.task import Result

_STYLES = {INTEGER: "green", FLOAT: "yellow", FUSED: "dim", CONSTANT: "dim", DATA: "dim"}


def facts(rows: Mapping[str, str]) -> Table:
    """Facts by name, one on each line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, Text(one_line(text)))
    return table


def operations_table(operations: Iterable[Operation]) -> Table:
    """One line for each operation, and below it one for each of its operands."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold underline")
    table.add_column("operation", no_wrap=True)
    table.add_column("kind or spec")
    for header in ("scale", "zero", "range"):
        table.add_column(header, justify="right")
    table.add_column("why or rule", overflow="fold")
    for operation in operations:
        table.add_row(
            Text(operation.name, style="bold" if operation.operands else "dim"),
            Text(operation.kind),
            *_sums(operation),
            _why(operation),
        )
        for operand in operation.operands:
            table.add_row(*_operand_row(operand))
    return table


def _sums(operation: Operation) -> tuple[str, str, str]:
    """The accumulator's type, its headroom in bits, and its range."""
    sums = operation.accumulator
    if sums is None:
        return "", "", ""
    return sums.type, f"{sums.headroom} free", f"{sums.low:,} .. {sums.high:,}"


def _why(operation: Operation) -> Text:
    style = _STYLES[operation.arithmetic]
    if operation.arithmetic == INTEGER:  # its reason adds nothing
        return Text(INTEGER, style=style)
    said = (f"{FLOAT}: ", style) if operation.arithmetic == FLOAT else ""
    return Text.assemble(said, operation.reason)


def _operand_row(operand: Operand) -> tuple[Text | str, ...]:
    name = Text(f"  {operand.name}")
    rule = operand.rule or "no rule"
    if operand.spec is None:
        return name, "float", "", "", "", Text(rule)
    return (
        name,
        Text(spec_text(operand)),
        _span(operand.scale, "{:.3g}"),
        _span(operand.zero_point, "{}"),
        _span(operand.range, "{:.3g}"),
        Text(rule),
    )


def spec_text(operand: Operand) -> str:
    """A short text for a spec: `u8 uniform`, `s8 uniform per axis`; per tensor is left out."""
    if operand.spec is None:
        return "float"
    spec = operand.spec.to_dict()
    words = [f"{'s' if spec['signed'] else 'u'}{spec['bits']}", spec["scheme"]]
    words += [f"per {spec['per']}"] if spec["per"] != "tensor" else []
    return " ".join(words)


def _span(ends: Sequence[float] | None, form: str) -> str:
    if ends is None:
        return ""
    low, high = (form.format(end) for end in ends)
    return low if low == high else f"{low} .. {high}"


def summary_text(summary: Mapping[str, Any]) -> str:
    """Counts of operations, operands and multiply-accumulates in words."""
    counts = summary["operations"]
    return (
        f"{counts[INTEGER]} operations integer, {counts[FLOAT]} float, {counts[FUSED]} fused into one of them, "
        f"{counts[CONSTANT]} the same for every image, {counts[DATA]} that only move data; "
        f"{summary['quantized_operands']} of {summary['operands']} operands quantized; "
        f"{summary['quantized_macs_percent']:.1f} % of {summary['macs'] / 1e6:,.1f} million multiply-accumulates "
        f"on quantized operands alone, {summary['integer_macs_percent']:.1f} % in integers."
    )


def ends_text(model: QuantizedModel) -> str:
    """The bits of the first and of the last layer, which papers often keep apart from the others."""
    layers = [site for site in model.sites if "weight" in site.operands]
    assigned = {str(r): model.assignments[value.name].spec for value in model.values for r in value.readers}
    texts = []
    for site in (layers[0], layers[-1]):
        specs = {operand: assigned[str(site.reader(operand))] for operand in site.operands}
        bits = ", ".join(f"{operand} {f'{spec.bits} bits' if spec else 'float'}" for operand, spec in specs.items())
        texts.append(f"{site.name} ({bits})")
    return "; ".join(texts)


def result_rows(result: Result) -> dict[str, str]:
    """The figures of an evaluation, in words."""
    match result:
        case ClassificationResult():
            rows = _classification_rows(result)
        case FeaturesResult():
            rows = _features_rows(result)
        case _:
            assert_never(result)
    rows["engine"] = (
        f"{result.engine}, {result.seconds:.1f} s, {result.images / max(result.seconds, 1e-9):.0f} images/s"
    )
    return rows


def _features_rows(result: FeaturesResult) -> dict[str, str]:
    rows = {"images": f"{result.images}"}
    for each in result.outputs:
        shape = " x ".join(map(str, each.shape))
        row = each.name if each.name == ONLY else f"{ONLY} {each.name}"  # no row of another kind is called so
        rows[row] = f"{shape}, cosine with the float model's {each.cosine:.4f}, lowest {each.lowest_cosine:.4f}"
        if each.neighbours is not None:
            rows[row] += f", {each.neighbours:.2f} % of the images have the same nearest neighbour"
    return rows


def _classification_rows(result: ClassificationResult) -> dict[str, str]:
    rows = {
        "images": f"{result.images}",
        "top-1": f"{result.top1:.2f} %",
        "top-5": f"{result.top5:.2f} %",
    }
    if result.top1_difference_interval is None:
        rows["float top-1"] = "not compared"
    else:
        low, high = result.top1_difference_interval
        difference = result.top1 - (result.float_top1 or 0.0)
        rows["float top-1"] = f"{result.float_top1:.2f} %"
        rows["difference"] = f"{difference:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}"
        rows["agreement"] = f"{result.agreement:.2f} % of the images get the float model's class"
    return rows


def sensitivity_table(measured: Sequence[Sensitivity]) -> Table:
    """One line for each sensitivity of a module or site at a bit width."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold underline")
    table.add_column("quantized alone", no_wrap=True, style="bold")
    table.add_column("kind")
    for header in ("bits", "output error", "correlation", "squared error", "nuclear norm", "product"):
        table.add_column(header, justify="right")
    for each in measured:
        numbers = (each.squared_error, each.nuclear_norm, each.nuclear_sensitivity)
        table.add_row(
            each.name,
            each.kind,
            str(each.bits),
            f"{100 * each.output_error:.3g} %",
            f"{each.correlation:.5f}",
            *(f"{number:.3g}" for number in numbers),
        )
    return table


def landscape_table(landscape: Landscape) -> Table:
    """A line for each form of the model along each line: where its loss is lowest, and how jagged it is."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold underline")
    table.add_column("line", no_wrap=True, style="bold")
    table.add_column("computed in")
    headers = ("loss at 0", "lowest", "at t", "local minima", "variation / spread", "held-out loss, at 0 and lowest")
    for header in (*headers, "agreement, %"):
        table.add_column(header, justify="right")
    for line in landscape.lines:
        for form, curve in line.curves.items():
            found = jaggedness(line.positions, curve.loss)
            if found is None:
                continue
            start, lowest = line.at(form, 0.0), line.at(form, found.at)
            held_out, agreement = ([start[place], lowest[place]] for place in (1, 2))
            table.add_row(
                line.name,
                form,
                _number(start[0], ".6g"),
                f"{found.lowest:.6g}",
                f"{found.at:.3g}",
                str(found.minima),
                f"{found.variation:.1f}",
                " ".join(_number(each, ".6g") for each in held_out),
                " ".join(_number(each, ".1f") for each in agreement),
            )
    return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def landscape_facts(landscape: Landscape) -> dict[str, str]:
    """What was moved, what a search found, and how the integers differ from the simulation, in words."""
    rows = {"scales": f"{landscape.scales} of block {landscape.block}: {', '.join(landscape.operands)}"}
    found = landscape.found
    if found is not None:
        change = "nothing better" if found.after == found.before else f"{found.after:.6g}"
        rows["search"] = (
            f"{found.search}, {found.evaluations} evaluations in {found.by}: loss {found.before:.6g}, then {change}"
        )
    differences = [each.difference for each in landscape.lines if each.difference is not None]
    if differences:
        rows["integers"] = f"the loss differs from the simulation's by {max(differences):.3g} at most"
    if landscape.simulated:
        rows["integers"] = f"not measured: {landscape.simulated}"
    undeployed = sum(each is None for line in landscape.lines for curve in line.curves.values() for each in curve.loss)
    if undeployed:
        rows["left out"] = f"{undeployed} points that cannot be deployed, or whose loss is not finite"
    return rows


def sweep_table(rows: Sequence[Row]) -> Table:
    """One line for each variant: the mean of each measure over the seeds, and below it the smallest and the largest."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold underline")
    table.add_column("recipe, bits, settings", style="bold", overflow="fold")
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    for name in ("seeds", *names):
        table.add_column(one_line(name), justify="right")
    for row in rows:
        seeds = max((len(values) for values in row.figures.values()), default=0)
        values = [list(row.figures.get(name, {}).values()) for name in names]
        table.add_row(Text(one_line(str(row))), str(seeds), *map(_mean, values))
        if seeds > 1:
            table.add_row("", "", *(Text(_ends(each), style="dim") for each in values))
        for seed, failure in row.failures.items():
            table.add_row(Text(one_line(f"seed {seed}: {failure}"), style="red"))
    return table


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.6g}" if values else ""


def _ends(values: Sequence[float]) -> str:
    return f"{min(values):.6g} .. {max(values):.6g}" if values else ""


def allocation_table(bits: Mapping[str, int]) -> Table:
    """The bits of every module, a line for each block."""
    parts = list(dict.fromkeys(name.rpartition(".")[2] for name in bits))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold underline")
    table.add_column("bits", no_wrap=True, style="bold")
    for part in parts:
        table.add_column(part, justify="right")
    for block in dict.fromkeys(name.rpartition(".")[0] for name in bits):
        table.add_row(block, *(str(bits.get(f"{block}.{part}", "")) for part in parts))
    return table


def recipes_table(recipes: Iterable[Recipe]) -> Table:
    """The recipes, one on each line."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold underline")
    table.add_column("recipe", no_wrap=True, style="bold")
    table.add_column("bits", no_wrap=True)
    for header in ("paper", "cost", "expected accuracy"):
        table.add_column(header, overflow="fold")
    for recipe in recipes:
        texts = (recipe.source, recipe.cost, recipe.expected)
        table.add_row(recipe.name, str(recipe.bits), *map(Text, texts))
    return table


def choices_table(choices: Iterable[Choice]) -> Table:
    """The recipes that `default` chooses from, by bits."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold underline")
    table.add_column("default", no_wrap=True, style="bold")
    table.add_column("recipe", overflow="fold")
    table.add_column("bits of probabilities", overflow="fold")
    for choice in choices:
        bits = f"from w{choice.weights}a{choice.activations}"
        table.add_row(bits, " ".join((choice.recipe, *choice.settings)), f"{choice.probs}, unless given")
    return table

"""Figures of sensitivities, Pareto fronts, loss landscapes and synthetic images; they need `vitquant[figures]`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from io import BytesIO
from typing import Any

from vitquant.allocation.front import Allocation, Costs
from vitquant.allocation.measure import Sensitivity
from vitquant.errors import ExportError
from vitquant.loss_landscape.table import SEARCHED, Curve, Landscape
from vitquant.synthetic_images import SyntheticImages

_ON_A_SHEET = 64  # images


def sensitivity_figure(modules: Sequence[Sensitivity], sites: Sequence[Sensitivity]) -> bytes:
    """A PNG: above the modules at each bit width, below the sites, both by output error on a logarithmic axis.

    Arguments:
        modules, sites: the sensitivities, in graph order.

    Raises:
        ExportError: matplotlib is not installed.
    """
    columns = max(len({each.name for each in modules}), len(sites))
    figure = _figure(max(8, 0.24 * columns + 2), 9)
    above, below = figure.subplots(2, 1)
    names = list(dict.fromkeys(each.name for each in modules))
    for bits in sorted({each.bits for each in modules}, key=int):
        of_bits = {each.name: each.output_error for each in modules if each.bits == bits}
        above.plot([of_bits[name] for name in names], marker="o", markersize=3, label=f"{bits} bits")
    _labelled(above, names, "modules", [each.output_error for each in modules])
    kinds = list(dict.fromkeys(each.kind for each in sites))
    for index, kind in enumerate(kinds):
        places = [place for place, each in enumerate(sites) if each.kind == kind]
        below.bar(places, [sites[place].output_error for place in places], color=f"C{index}", label=kind)
    _labelled(below, [each.name for each in sites], "sites", [each.output_error for each in sites])
    return _png(figure)


def front_figure(
    front: Sequence[Allocation],
    uniform: Mapping[int, tuple[float, float]],
    chosen: Allocation,
    costs: Costs,
    sensitivity: str,
) -> bytes:
    """A PNG of the Pareto front of cost and sensitivity, with uniform allocations and the chosen one.

    Arguments:
        front: the Pareto-optimal allocations.
        uniform: cost and sensitivity of the model if all modules have a bit width, by the width.
        chosen: the allocation to mark.
        costs: the costs from which those of all allocations were computed.
        sensitivity: the label of the axis.

    Raises:
        ExportError: matplotlib is not installed.
    """
    figure = _figure(8, 5)
    axes = figure.subplots()
    axes.plot(
        [costs.total(each.cost) for each in front], [each.sensitivity for each in front], ".-", label="mixed, best"
    )
    for bits, (price, lost) in sorted(uniform.items()):
        axes.plot(costs.total(price), lost, "s", color="C1")
        axes.annotate(f"{bits} bits", (costs.total(price), lost), textcoords="offset points", xytext=(6, 4))
    axes.plot([], [], "s", color="C1", label="the same bits everywhere")
    axes.plot(costs.total(chosen.cost), chosen.sensitivity, "*", markersize=14, color="C3", label="chosen")
    axes.set(xlabel=costs.unit, ylabel=sensitivity, yscale=_scale([each.sensitivity for each in front]))
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


def landscape_figure(landscape: Landscape) -> bytes:
    """A PNG: for each line a column, with the loss, the loss on held-out images and the agreement on these.

    Raises:
        ExportError: matplotlib is not installed.
    """
    rows: list[tuple[str, Callable[[Curve], Sequence[float | None] | None]]] = [
        (f"loss ({landscape.loss}), calibration images", lambda curve: curve.loss),
        (f"loss ({landscape.loss}), held-out images", lambda curve: curve.held_out_loss),
        ("agreement, held-out images, %", lambda curve: curve.agreement),
    ]
    drawn = [row for row in rows if all(row[1](curve) for line in landscape.lines for curve in line.curves.values())]
    figure = _figure(1 + 4 * len(landscape.lines), 1 + 2.6 * len(drawn))
    grid = figure.subplots(len(drawn), len(landscape.lines), sharex="col", sharey="row", squeeze=False)
    for above, (label, of) in zip(grid, drawn, strict=True):
        above[0].set_ylabel(label)
        for axes, line in zip(above, landscape.lines, strict=True):
            for place, (form, curve) in enumerate(line.curves.items()):
                heights = [math.nan if each is None else each for each in of(curve) or ()]
                axes.plot(line.positions, heights, ".-", color=f"C{place}", label=form, zorder=3 - place)
            axes.axvline(0, color="grey", linewidth=0.8)
            axes.grid(alpha=0.3)
    for axes, line in zip(grid[0], landscape.lines, strict=True):
        axes.set_title(line.name)
    for axes, line in zip(grid[-1], landscape.lines, strict=True):
        axes.set_xlabel("t: 0 as quantized, 1 as found" if line.name == SEARCHED else "t: each scale times 1 + t u")
    grid[0][0].legend(fontsize="small")
    quantized = f"{landscape.about.get('recipe', '')} {landscape.about.get('bits', '')}".strip()
    figure.suptitle(f"{quantized}: {landscape.scales} scales of block {landscape.block}")
    return _png(figure)


def contact_sheet(images: SyntheticImages) -> bytes:
    """A PNG of the first 64 images, and below them how the parts of the loss developed, if they were optimized.

    Raises:
        ExportError: matplotlib is not installed.
    """
    shown = images.pixels[:_ON_A_SHEET].permute(0, 2, 3, 1).numpy()
    columns = min(8, len(shown))
    rows = math.ceil(len(shown) / columns)
    traces: Mapping[str, Sequence[float]] = (images.about.get("losses") or [{}])[0]
    figure = _figure(1.6 * max(4, columns), 1.6 * rows + 0.4 + (2.6 if traces else 0))
    parts = figure.subfigures(2 if traces else 1, 1, height_ratios=[1.6 * rows, 2.6] if traces else None, squeeze=False)
    for axes in parts[0][0].subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image in zip(parts[0][0].axes, shown, strict=False):
        axes.imshow(image, interpolation="nearest")
    if traces:
        for axes, (name, values) in zip(parts[1][0].subplots(1, len(traces)), traces.items(), strict=True):
            axes.plot(range(1, len(values) + 1), values)
            axes.set(title=name, xlabel="iteration")
            axes.grid(alpha=0.3)
    figure.suptitle(f"{images.about['method']}, {len(images)} images, seed {images.about['seed']}")
    return _png(figure)


def check_matplotlib() -> None:
    """Refuse figures without matplotlib, before any long work.

    Raises:
        ExportError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ExportError("figures need matplotlib: pip install 'vitquant[figures]'")


def _figure(width: float, height: float) -> Any:
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _scale(values: Sequence[float]) -> str:
    """The scale of an axis: logarithmic unless a value is zero."""
    return "log" if values and min(values) > 0 else "linear"


def _labelled(axes: Any, names: Sequence[str], title: str, values: Sequence[float]) -> None:
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
    axes.set(yscale=_scale(values), ylabel="output error", title=title)
    if names:
        axes.legend(ncols=3, fontsize="small")
    axes.margins(x=0.01)
    axes.grid(axis="y", alpha=0.3)


def _png(figure: Any) -> bytes:
    content = BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()

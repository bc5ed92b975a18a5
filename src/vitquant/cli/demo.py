"""`vitquant demo`: every recipe for which there is time, on a trained model and images from the package."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vitquant.cli import options
from vitquant.cli.terminal import Terminal
from vitquant.files import Directory

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vitquant.model import QuantizedModel
    from vitquant.recipe import Recipe
    from vitquant.tasks.classification import ClassificationResult

    Batches = Sequence[tuple[Tensor, Tensor]]

_BATCH = 32  # gives eight calibration batches, for observers that average over batches
_IMAGES = "test-images"  # not the name of any recipe

Output = Annotated[Path, typer.Option(metavar="DIR", help="The directory to write, with one for each model.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier demo.")]
Minutes = Annotated[
    float,
    typer.Option(min=0, callback=options.finite, help="Leave out the recipes that do not fit into this time together."),
]
Seed = Annotated[int, typer.Option(min=0, max=options.LARGEST_SEED, help="Seed of recipes that draw at random.")]


def demo(
    output: Output = Path("vitquant-demo"),
    force: Force = False,
    minutes: Minutes = 3.0,
    seed: Seed = 0,
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Quantize a small trained model by every recipe that fits the time, and compare each with float."""
    started = time.perf_counter()
    with Terminal(json, quiet) as terminal:
        with terminal.progress("loading"):
            from vitquant.demo import batches, estimated_seconds, model, source, write_folder
            from vitquant.recipe import available
            from vitquant.report.tables import facts
            from vitquant.tasks.classification import evaluate

            recipes = sorted(available(), key=lambda recipe: (recipe.relative_cost, recipe.name))
        with terminal.replacing(output, force, _kind(recipes)) as new:
            with terminal.progress("loading"):
                options.choose_device(options.Device.CPU, threads)
                network, calibration, test = model(), batches("train", _BATCH), batches("test", _BATCH)
                seen, asked = (sum(len(classes) for _, classes in data) for data in (calibration, test))
            with terminal.progress("float", asked) as update:
                reference = evaluate(network, None, test, progress=lambda _, done, total: update(completed=done))
            tried: list[_Trial] = []
            left_out = []
            for recipe in recipes:
                data = _first(calibration, recipe.calibration.images)
                used = sum(len(classes) for _, classes in data)
                estimate = estimated_seconds(recipe.relative_cost, used, asked, reference.seconds / asked)
                left = max(60 * minutes - (time.perf_counter() - started), 0.0)
                if estimate > left:
                    left_out.append(_left_out(recipe, estimate, left, 60 * minutes))
                    continue
                with terminal.progress(recipe.name, used) as update:
                    tried.append(_try(recipe, network, data, test, seed, update))
            with terminal.progress("writing"):
                for trial in tried:
                    trial.quantized.save(new / trial.quantized.recipe.name)
                write_folder(new / _IMAGES)
        values = {
            "model": source().name,
            "calibration_images": seen,
            "test_images": asked,
            "float_top1": reference.top1,
            "float_bytes": sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()),
            "recipes": [_facts(trial, output) for trial in tried],
            "left_out": left_out,
            "images": str(output / _IMAGES),
            "seconds": time.perf_counter() - started,
        }
        terminal.result(values, _table(values), facts(_rows(values)))


def _kind(recipes: Iterable[Recipe]) -> Directory:
    """The kind of directory that a demo writes: saved models for some of the recipes, and the images."""
    from vitquant.demo import folder_of_images
    from vitquant.model.checkpoint import SAVED_MODEL

    images = folder_of_images()
    layout = {recipe.name: SAVED_MODEL.layout for recipe in recipes} | {_IMAGES: images.layout}
    return Directory("demo", layout, lambda directory: images.recognize(directory / _IMAGES))


@dataclass(frozen=True)
class _Trial:
    """The quantized model of one recipe, its evaluation, and the time that both took."""

    quantized: QuantizedModel
    result: ClassificationResult
    seconds: float


def _try(
    recipe: Recipe, network: nn.Module, calibration: Batches, test: Batches, seed: int, update: Callable[..., None]
) -> _Trial:
    """Quantize by a recipe and evaluate together with the float model, reporting the progress of each step."""
    import torch

    from vitquant import workflows
    from vitquant.demo import PREPROCESSING, source
    from vitquant.engines import default_engine
    from vitquant.tasks.classification import evaluate

    started = time.perf_counter()
    torch.manual_seed(seed)  # for each recipe, so that results do not depend on earlier recipes

    def show(what: str, done: int, total: int) -> None:
        update(description=f"{recipe.name}: {what}", completed=done, total=total, unit="")

    stream, steps = _Watched(calibration, show), PREPROCESSING.to_dict()
    quantized = workflows.quantize(network, recipe, stream, source=source(), preprocessing=steps, progress=show)
    name, computed, _ = default_engine(quantized)
    asked = sum(len(classes) for _, classes in test)
    result = evaluate(computed, network, test, lambda what, done, _: show(what, done, asked), engine=name)
    return _Trial(quantized, result, time.perf_counter() - started)


class _Watched:
    """Batches that report progress whenever they are iterated over."""

    def __init__(self, batches: Batches, show: Callable[[str, int, int], None]) -> None:
        self._batches, self._show = batches, show

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        done, total = 0, sum(len(images) for images, _ in self._batches)
        for images, labels in self._batches:
            yield images, labels
            done += len(images)
            self._show("calibrating", done, total)


def _first(calibration: Batches, images: int) -> Batches:
    """The first calibration images: as many as a recipe asks for, or all if there are fewer."""
    found, seen = [], 0
    for batch, classes in calibration:
        if seen < images:
            found.append((batch[: images - seen], classes[: images - seen]))
        seen += len(batch)
    return found


def _left_out(recipe: Recipe, estimate: float, left: float, budget: float) -> dict[str, Any]:
    reason = f"would take about {estimate:.0f} s, and {left:.0f} s of {budget:g} s are left; --minutes gives more"
    return {
        "recipe": recipe.name,
        "bits": str(recipe.bits),
        "relative_cost": recipe.relative_cost,
        "estimated_seconds": estimate,
        "reason": reason,
    }


def _facts(trial: _Trial, output: Path) -> dict[str, Any]:
    """The result of one recipe, as plain values."""
    from vitquant.engines import program_of
    from vitquant.model.checkpoint import TENSORS
    from vitquant.report.operations import FLOAT, INTEGER, list_operations, summarize

    quantized, result = trial.quantized, trial.result
    directory = output / quantized.recipe.name
    summary = summarize(list_operations(quantized, program_of(quantized)[0]))
    counts = summary["operations"]
    assert result.float_top1 is not None  # evaluated with the float model
    return {
        "recipe": quantized.recipe.name,
        "bits": str(quantized.bits),
        "relative_cost": quantized.recipe.relative_cost,
        "calibration_images": quantized.provenance["calibration"]["images"],
        "engine": result.engine,
        "top1": result.top1,
        "difference": result.top1 - result.float_top1,
        "difference_interval": result.top1_difference_interval,
        "agreement": result.agreement,
        "bytes": (directory / TENSORS).stat().st_size,
        "integer_operations": counts[INTEGER],
        "arithmetic_operations": counts[INTEGER] + counts[FLOAT],
        "quantized_macs_percent": summary["quantized_macs_percent"],
        "directory": str(directory),
        "seconds": trial.seconds,
    }


def _table(values: Mapping[str, Any]) -> Table:
    """A line for the float model and one for each recipe; the table fits into 80 columns."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold underline")
    table.add_column("recipe", no_wrap=True, style="bold")
    table.add_column("bits", no_wrap=True)
    for header in ("top-1", "difference, 95 %", "agree", "MB", "integer", "MACs"):
        table.add_column(header, justify="right", overflow="fold")
    table.add_row("float", "", f"{values['float_top1']:.1f}", "", "", f"{values['float_bytes'] / 1e6:.1f}")
    for one in values["recipes"]:
        low, high = one["difference_interval"]
        table.add_row(
            one["recipe"],
            one["bits"],
            f"{one['top1']:.1f}",
            f"{one['difference']:+.1f} ({low:+.1f} to {high:+.1f})",
            f"{one['agreement']:.1f}",
            f"{one['bytes'] / 1e6:.1f}",
            f"{one['integer_operations']} of {one['arithmetic_operations']}",
            f"{one['quantized_macs_percent']:.0f} %",
        )
    return table


def _computed(recipes: Iterable[Mapping[str, Any]]) -> str:
    """Which recipes were computed in integers."""
    integer = [one["recipe"] for one in recipes if one["engine"] == "integer"]
    return f"{', '.join(integer)} in integers, the others simulated" if integer else "simulated in float"


def _rows(values: Mapping[str, Any]) -> dict[str, str]:
    """The meaning of the columns, the recipes that were left out, and commands to try next."""
    rows = {
        "top-1": f"percent of {values['test_images']} test images of CIFAR-10; {_computed(values['recipes'])}",
        "difference": "top-1 minus float top-1, in points, with its paired 95 % interval",
        "agree": "percent of the images that get the float model's class",
        "integer": "operations that integers can compute, of all that compute",
        "MACs": "share of the multiply-accumulates whose operands are all quantized",
        "calibrated on": f"up to {values['calibration_images']} training images, as recipes ask for; all in "
        f"{values['seconds']:.0f} s",
    }
    rows |= {f"no {one['recipe']}": one["reason"] for one in values["left_out"]}
    if values["recipes"]:
        rows["written to"] = ", ".join(one["directory"] for one in values["recipes"])
        directory = values["recipes"][0]["directory"]
        rows["look further"] = shlex.join(["vitquant", "inspect", directory])
        rows["evaluate again"] = shlex.join(["vitquant", "evaluate", directory, "--data", values["images"]])
    return rows

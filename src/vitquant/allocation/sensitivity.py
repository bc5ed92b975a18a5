"""The sensitivity of a model to the bits of its parts, by which bits are allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from vitquant.allocation.measure import SENSITIVITY, Part, Sensitivity, measure
from vitquant.allocation.modules import Module, find_modules
from vitquant.allocation.table import SensitivityTable
from vitquant.autocast import in_own_precision
from vitquant.calibration_data import Batch, CalibrationData, batches_of, images_of
from vitquant.errors import AllocationError, CalibrationError, RecipeError
from vitquant.model import QuantizedModel
from vitquant.model.checkpoint import digest_of
from vitquant.model.saved import stored_bytes
from vitquant.progress import Progress, silent
from vitquant.recipe import Bits, Method, Recipe, requested
from vitquant.recipe.override import Settings
from vitquant.schema import Integer, ListOf, Table, TableOf
from vitquant.spec import MAX_BITS, MIN_BITS
from vitquant.work import WorkDirectory
from vitquant.workflows import quantize

CANDIDATES = (4, 5, 6, 7, 8)
# A short search is accurate enough for measuring, and takes a fifteenth of the time. Bias correction is left out, since
# it assumes that all layers are quantized, and here all but one part are in float.
_CANDIDATES, _BRIEFLY = 20, {"rounds": 1, "bias_correction": False}


@in_own_precision
def sensitivity(
    model: nn.Module,
    recipe: str | Recipe,
    data: Iterable[Batch],
    *,
    bits: str | None = None,
    candidates: Sequence[int] = CANDIDATES,
    settings: Settings = (),
    progress: Progress = silent,
    work: str | Path | None = None,
) -> SensitivityTable:
    """Measure the sensitivity of each module at each bit width, and of each site at the recipe's, all else in float.

    Scales are chosen by the recipe's methods, but a scale search is short, with at most 20 candidates, one round and no
    bias correction. All operations are in float.

    Arguments:
        model, recipe, data, settings: as for `quantize`; the data are iterated over several times for each candidate.
        bits: of all values outside of modules, and for measuring the sites; the recipe's when None.
        candidates: the bit widths of the modules.
        progress: called with the current activity, the amount done and the total.
        work: a directory in which measurements are saved: after an interruption the same call continues there. It can
            be removed afterwards.

    Raises:
        AllocationError: there are fewer than two candidates, a rule's scheme does not support a width, or the model has
            no module for whose weights the recipe has a symbol as bits.
        CalibrationError: the data can be iterated over only once.
        CheckpointError: the work directory belongs to another run.
        VitquantError: see `quantize`.

    Source: VT-PTQ, Liu et al. 2021, section "Nuclear Norm Based Mixed Precision".
    """
    if isinstance(batches_of(data), Iterator):
        raise CalibrationError("sensitivity reads the images several times: give a list of batches or a DataLoader")
    whole, base = requested(recipe, bits, settings)
    widths = {width: _at(base, width) for width in check_candidates(candidates)}
    _check_schemes(whole, widths.values())
    measured = replace(whole, methods=tuple(_measured(whole.methods)))
    device = next((parameter.device for parameter in model.parameters()), None)

    with ExitStack() as held:
        kept = None
        if work is not None:
            run = {
                "model": digest_of(model.state_dict(), {}),
                "recipe": measured.to_dict(),
                "bits": str(base),
                "candidates": sorted(widths),
                "images": CalibrationData(data, device).first,
            }
            kept = held.enter_context(WorkDirectory.opened(work, run))
        return _Measuring(model, whole, measured, data, device, progress, kept).table(base, widths)


_MEASURED = Table({"measured": ListOf(SENSITIVITY), "bytes": TableOf(Integer(0))})


@dataclass(frozen=True)
class _Measuring:
    """The inputs of all measurements of a model.

    Arguments:
        model: the float model.
        whole, measured: the recipe, and the same with only the methods that choose scales.
        data, device: the images, and the device of the model.
        progress: called with the current activity, the amount done and the total.
        kept: where measurements are saved, and where a killed run saved its own; None saves nothing.
    """

    model: nn.Module
    whole: Recipe
    measured: Recipe
    data: Iterable[Batch]
    device: torch.device | None
    progress: Progress
    kept: WorkDirectory | None

    def table(self, base: Bits, widths: Mapping[int, Bits]) -> SensitivityTable:
        """Measure sites at the bits of the recipe, and modules at all candidates."""
        steps = len(widths) + (base not in widths.values())
        self.progress("calibrating", 0, steps)
        at_base = self._quantized(base)
        modules = find_modules(at_base)
        if not modules:
            name = self.whole.name
            raise AllocationError(f"{name}: no attention or MLP of a block has weights whose bits are a symbol")
        of_sites = _site_parts(at_base)
        names = [part.name for part in of_sites]
        sites, _ = self._once("sites", names, lambda: (self._measure(at_base, of_sites), {}))
        found: list[Sensitivity] = []
        sizes: dict[str, dict[int, int]] = {module.name: {} for module in modules}
        for number, (width, of_width) in enumerate(widths.items()):
            self.progress("calibrating", number + steps - len(widths), steps)
            at = partial(self._at_width, at_base if of_width == base else None, of_width, width, modules)
            measured, stored = self._once(f"{width}-bits", list(sizes), at)
            found += measured
            for name, size in stored.items():
                sizes[name][width] = size
        stored = stored_bytes(at_base)
        return SensitivityTable(
            self.whole,
            str(base),
            tuple(found),
            tuple(sites),
            {module.name: sum(module.weights.values()) for module in modules},
            sizes,
            {module.name: module.values for module in modules},
            sum(stored.values()) - sum(stored[key] for module in modules for key in module.weights),
            {"calibration": at_base.provenance["calibration"]},
        )

    def _quantized(self, bits: Bits) -> QuantizedModel:
        work = None if self.kept is None else self.kept.path / str(bits)
        return quantize(self.model, self.measured, self.data, bits=str(bits), progress=self.progress, work=work)

    def _at_width(
        self, quantized: QuantizedModel | None, bits: Bits, width: int, modules: Sequence[Module]
    ) -> tuple[list[Sensitivity], dict[str, int]]:
        """The sensitivities of the modules at a width, and the bytes of their weights, by the module's name."""
        quantized = self._quantized(bits) if quantized is None else quantized
        parts = [_as_part(module, width) for module in modules]
        stored = stored_bytes(quantized)
        sizes = {module.name: sum(stored[key] for key in module.weights) for module in modules}
        return self._measure(quantized, parts), sizes

    def _measure(self, quantized: QuantizedModel, parts: Sequence[Part]) -> list[Sensitivity]:
        images = (images_of(batch).to(self.device) for batch in self.data)
        return measure(quantized, parts, images, self.progress)

    def _once(
        self, name: str, parts: list[str], measured: Callable[[], tuple[list[Sensitivity], dict[str, int]]]
    ) -> tuple[list[Sensitivity], dict[str, int]]:
        """The measurements of some parts under a name, made now or read from a killed run."""
        saved = None if self.kept is None else self.kept.read(name, _MEASURED)
        if saved is not None:
            found = [Sensitivity(**each) for each in saved.values["measured"]]
            if [each.name for each in found] != parts or not {*saved.values["bytes"]} <= {*parts}:
                raise saved.damaged()
            return found, saved.values["bytes"]
        found, sizes = measured()
        if self.kept is not None:
            self.kept.write(name, {}, {"measured": [each.to_dict() for each in found], "bytes": sizes})
        return found, sizes


def check_candidates(candidates: Sequence[int]) -> list[int]:
    """The candidate bit widths sorted and without duplicates.

    Raises:
        AllocationError: there are fewer than two, or one is outside 2 to 16.
    """
    widths = sorted(set(candidates))
    if len(widths) < 2 or not MIN_BITS <= widths[0] <= widths[-1] <= MAX_BITS:
        raise AllocationError(
            f"candidates {', '.join(map(str, candidates))}: give two or more bit widths from {MIN_BITS} to {MAX_BITS}"
        )
    return widths


def _at(base: Bits, width: int) -> Bits:
    """The bits of a model with modules of a width; probabilities get it too if they have the bits of activations."""
    probs = width if base.probs == base.activations else base.probs
    return replace(base, weights=width, activations=width, probs=probs)


def _check_schemes(recipe: Recipe, widths: Iterable[Bits]) -> None:
    """Refuse a width that a rule's scheme does not support, before any work is done."""
    for bits in widths:
        for rule in recipe.rules:
            if rule.spec is not None:
                try:
                    rule.spec.resolve(bits, channel_axis=-1)
                except RecipeError as error:
                    raise AllocationError(
                        f"candidate {bits.weights}, rule {rule.name!r}: {error}; leave the candidate out, or give the "
                        f"rule bits of its own: --set {rule.name}.bits=8"
                    ) from error


def _measured(methods: Iterable[Method]) -> Iterator[Method]:
    """A recipe's methods for measuring: those that choose scales."""
    for method in methods:
        if method.name == "search-scales":
            asked = method.settings.get("candidates", _CANDIDATES)
            fewer = min(_CANDIDATES, asked) if isinstance(asked, int) else asked  # other types are refused later
            yield Method(method.name, {**method.settings, **_BRIEFLY, "candidates": fewer})
        elif method.name != "integer-operations":
            yield method


def _as_part(module: Module, width: int) -> Part:
    values = tuple(name for names in module.values.values() for name in names)
    return Part(module.name, "module", str(width), values, module.output)


def _site_parts(model: QuantizedModel) -> list[Part]:
    """Every site with a quantized operand; the quantizer of a value that several sites read is measured with each."""
    parts = []
    for site in model.sites:
        names = dict.fromkeys(value.name for value in model.index.read_by(site).values())
        bits = {name: spec.bits for name in names if (spec := model.assignments[name].spec) is not None}
        if bits:
            output = f"{site.name}:input" if site.kind == "output" else site.name
            widths = "/".join(str(width) for width in dict.fromkeys(bits.values()))
            parts.append(Part(site.name, site.kind, widths, tuple(bits), output))
    return parts

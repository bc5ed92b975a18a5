"""How sensitive a model is to the bits of its parts, which is what bits are allocated by."""

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
# A search for what is measured: near enough, and a fifteenth of the time. Corrected biases belong to a model whose
# layers are all quantized, and here all but one part are in float.
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
    """Measure what each module loses at each bit width, and each site at the recipe's, all else in float.

    Scales are those that the recipe's methods give; a search is a brief one, of 20 candidates at most and one round,
    without bias correction. All operations are in float.

    Arguments:
        model, recipe, data, settings: as for `quantize`; the data are read several times for each candidate.
        bits: of everything that is no module's, and of the sites; the recipe's when None.
        candidates: bit widths of the modules.
        progress: told what is done.
        work: a directory in which what was measured is kept: after an interruption the same call goes on there. It
            can be removed afterwards.

    Raises:
        AllocationError: fewer than two candidates, a width that a rule cannot have, or a model without modules that
            the recipe gives symbols for bits.
        CalibrationError: the data can be read only once.
        CheckpointError: the work directory is another run's.
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
    """What every measurement of a model needs.

    Arguments:
        model: float.
        whole, measured: the recipe, and what of it chooses scales.
        data, device: the images, and where they go.
        progress: told what is done.
        kept: where a killed run left what it had measured.
    """

    model: nn.Module
    whole: Recipe
    measured: Recipe
    data: Iterable[Batch]
    device: torch.device | None
    progress: Progress
    kept: WorkDirectory | None

    def table(self, base: Bits, widths: Mapping[int, Bits]) -> SensitivityTable:
        """Sites at the bits of the recipe, modules at all of their candidates."""
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
        """Modules at a width, one model at a time, as each has weights of its own; and what they take."""
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
        """What was measured of some parts under a name, now or by a killed run."""
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
    """Candidate bit widths, the smallest first, each once.

    Raises:
        AllocationError: fewer than two, or one outside 2 to 16.
    """
    widths = sorted(set(candidates))
    if len(widths) < 2 or not MIN_BITS <= widths[0] <= widths[-1] <= MAX_BITS:
        raise AllocationError(
            f"candidates {', '.join(map(str, candidates))}: give two or more bit widths from {MIN_BITS} to {MAX_BITS}"
        )
    return widths


def _at(base: Bits, width: int) -> Bits:
    """The bits of a model whose modules have a width; probabilities have it where they follow the activations."""
    probs = width if base.probs == base.activations else base.probs
    return replace(base, weights=width, activations=width, probs=probs)


def _check_schemes(recipe: Recipe, widths: Iterable[Bits]) -> None:
    """Refuse a width that a rule's scheme does not have before any work is done."""
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
            fewer = min(_CANDIDATES, asked) if isinstance(asked, int) else asked  # what is no number is refused later
            yield Method(method.name, {**method.settings, **_BRIEFLY, "candidates": fewer})
        elif method.name != "integer-operations":
            yield method


def _as_part(module: Module, width: int) -> Part:
    values = tuple(name for names in module.values.values() for name in names)
    return Part(module.name, "module", str(width), values, module.output)


def _site_parts(model: QuantizedModel) -> list[Part]:
    """Every site that reads something quantized; where sites read one value, its quantizer is measured with each."""
    parts = []
    for site in model.sites:
        names = dict.fromkeys(value.name for value in model.index.read_by(site).values())
        bits = {name: spec.bits for name in names if (spec := model.assignments[name].spec) is not None}
        if bits:
            output = f"{site.name}:input" if site.kind == "output" else site.name
            widths = "/".join(str(width) for width in dict.fromkeys(bits.values()))
            parts.append(Part(site.name, site.kind, widths, tuple(bits), output))
    return parts

"""How sensitive a model is to the bits of its parts, which is what bits are allocated by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from vitquant.allocation.modules import Module, find_modules
from vitquant.allocation.sensitivity import Part, Sensitivity, measure
from vitquant.allocation.table import SensitivityTable
from vitquant.autocast import in_own_precision
from vitquant.calibration_data import Batch, batches_of, images_of
from vitquant.errors import AllocationError, CalibrationError, RecipeError
from vitquant.model import QuantizedModel
from vitquant.model.saved import stored_bytes
from vitquant.pipeline import quantize
from vitquant.progress import Progress, silent
from vitquant.recipe import Bits, Method, Recipe, requested
from vitquant.spec import MAX_BITS, MIN_BITS

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
    settings: Sequence[str] = (),
    progress: Progress = silent,
) -> SensitivityTable:
    """Measure what each module loses at each bit width, and each site at the recipe's, all else in float.

    Scales are those that the recipe's methods give; a search is a brief one, of 20 candidates at most and one round,
    without bias correction. All operations are in float.

    Arguments:
        model, recipe, data, settings: as for `quantize`; the data are read several times for each candidate.
        bits: of everything that is no module's, and of the sites; the recipe's when None.
        candidates: bit widths of the modules.
        progress: told what is done.

    Raises:
        AllocationError: fewer than two candidates, a width that a rule cannot have, or a model without modules that
            the recipe gives symbols for bits.
        CalibrationError: the data can be read only once.
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

    def images() -> Iterator[Tensor]:
        return (images_of(batch).to(device) for batch in data)

    steps = len(widths) + (base not in widths.values())
    progress("calibrating", 0, steps)
    at_base = quantize(model, measured, data, bits=str(base), progress=progress)
    modules = find_modules(at_base)
    if not modules:
        raise AllocationError(f"{whole.name}: no attention or MLP of a block has weights whose bits are a symbol")
    sites = measure(at_base, _site_parts(at_base), images(), progress)
    found: list[Sensitivity] = []
    sizes: dict[str, dict[int, int]] = {module.name: {} for module in modules}
    for width, of_width in widths.items():  # one model at a time: each has weights of its own
        progress("calibrating", len(found) // len(modules) + steps - len(widths), steps)
        if of_width == base:
            quantized = at_base
        else:
            quantized = quantize(model, measured, data, bits=str(of_width), progress=progress)
        found += measure(quantized, [_as_part(module, width) for module in modules], images(), progress)
        stored = stored_bytes(quantized)
        for module in modules:
            sizes[module.name][width] = sum(stored[key] for key in module.weights)
    stored = stored_bytes(at_base)
    return SensitivityTable(
        whole,
        str(base),
        tuple(found),
        tuple(sites),
        {module.name: sum(module.weights.values()) for module in modules},
        sizes,
        {module.name: module.values for module in modules},
        sum(stored.values()) - sum(stored[key] for module in modules for key in module.weights),
        {"calibration": at_base.provenance["calibration"]},
    )


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

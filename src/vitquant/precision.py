"""How sensitive a model is to the bits of its parts, which is what bits are allocated by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from vitquant.allocation.modules import find_modules
from vitquant.allocation.sensitivity import Part, measure
from vitquant.allocation.table import SensitivityTable
from vitquant.errors import AllocationError, CalibrationError
from vitquant.model import QuantizedModel
from vitquant.pipeline import Batch, images_of, quantize
from vitquant.progress import Progress, silent
from vitquant.recipe import Bits, Method, Recipe, load_recipe, override
from vitquant.spec import MAX_BITS, MIN_BITS

CANDIDATES = (4, 5, 6, 7, 8)
# A search for what is measured: near enough, and a fifteenth of the time. Corrected biases belong to a model whose
# layers are all quantized, and here all but one part are in float.
_BRIEFLY = {"candidates": 20, "rounds": 1, "bias_correction": False}


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

    Scales are those that the recipe's methods give; a search is a brief one, of 20 candidates and one round. All
    operations are in float.

    Arguments:
        model, recipe, data, settings: as for `quantize`; the data are read several times for each candidate.
        bits: of everything that is no module's, and of the sites; the recipe's when None.
        candidates: bit widths of the modules.
        progress: told what is done.

    Raises:
        AllocationError: fewer than two candidates, a width outside 2 to 16, or a model without modules that the
            recipe gives symbols for bits.
        CalibrationError: the data can be read only once.
        VitquantError: see `quantize`.

    Source: VT-PTQ, Liu et al. 2021, section "Nuclear Norm Based Mixed Precision".
    """
    if iter(data) is data:
        raise CalibrationError("sensitivity reads the images several times: give a list of batches or a DataLoader")
    widths = sorted(set(candidates))
    if len(widths) < 2 or not MIN_BITS <= widths[0] <= widths[-1] <= MAX_BITS:
        raise AllocationError(
            f"candidates {', '.join(map(str, candidates))}: give two or more bit widths from {MIN_BITS} to {MAX_BITS}"
        )
    whole = override(load_recipe(recipe) if isinstance(recipe, str) else recipe, settings)
    measured = replace(whole, methods=tuple(_measured(whole.methods)))
    base = whole.bits if bits is None else Bits.parse(bits)
    models: dict[int, QuantizedModel] = {}
    for done, width in enumerate(widths):
        progress("calibrating", done, len(widths) + 1)
        probs = width if base.probs == base.activations else base.probs
        models[width] = quantize(
            model,
            measured,
            data,
            bits=str(replace(base, weights=width, activations=width, probs=probs)),
            progress=progress,
        )
    progress("calibrating", len(widths), len(widths) + 1)
    at_base = quantize(model, measured, data, bits=str(base), progress=progress)
    modules = find_modules(at_base)
    if not modules:
        raise AllocationError(f"{whole.name}: no attention or MLP of a block has weights whose bits are a symbol")
    device = next((parameter.device for parameter in model.parameters()), None)

    def images() -> Iterator[Tensor]:
        return (images_of(batch).to(device) for batch in data)

    as_parts = [Part(module.name, "module", module.values, module.output) for module in modules]
    found = measure(models, dict.fromkeys(widths, as_parts), images(), progress)
    found += measure({at_base.bits.weights: at_base}, {at_base.bits.weights: _site_parts(at_base)}, images(), progress)
    other = at_base.stored_bytes - sum(module.bytes(at_base.bits.weights) for module in modules)
    about = {"calibration": at_base.provenance["calibration"]}
    return SensitivityTable.of(whole, str(base), modules, found, other, about)


def _measured(methods: Iterable[Method]) -> Iterator[Method]:
    """A recipe's methods for measuring: those that choose scales."""
    for method in methods:
        if method.name == "search-scales":
            yield Method(method.name, {**method.settings, **_BRIEFLY})
        elif method.name != "integer-operations":
            yield method


def _site_parts(model: QuantizedModel) -> list[Part]:
    """Every site that reads something quantized; where sites read one value, its quantizer is measured with each."""
    parts = []
    for site in model.sites:
        values = tuple(dict.fromkeys(model.value(str(site.reader(operand))).name for operand in site.operands))
        quantized = tuple(name for name in values if model.assignments[name].spec is not None)
        if quantized:
            output = f"{site.name}:input" if site.kind == "output" else site.name
            parts.append(Part(site.name, site.kind, quantized, output))
    return parts

"""How much a model's outputs change when one part of it is quantized and all else is float."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from vitquant.errors import AllocationError, CalibrationError
from vitquant.model import QuantizedModel, Tap
from vitquant.objectives.correlation import correlation
from vitquant.progress import Progress, silent

_IMAGES_AT_ONCE = 8  # every part's float result is held for these


@dataclass(frozen=True)
class Part:
    """What is quantized by itself, and where the effect is looked at.

    Arguments:
        name: a site's or a module's.
        kind: a site's, or `module`.
        values: the names of the values that are quantized.
        output: what is compared with float: what a site computes, or `site:operand`, what one reads.
    """

    name: str
    kind: str
    values: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Sensitivity:
    """What one part loses at one bit width, as means over images.

    Arguments:
        name, kind: the part's.
        bits: the width.
        output_error: the squared change of the logits, over the square of the float logits.
        correlation: Pearson's of the part's own output with what it is in float.
        squared_error: the squared change of the part's own output, summed over its elements.
        nuclear_norm: the sum of the singular values of the float output, over all of its matrices.
        nuclear_sensitivity: the product of these two, image by image: Omega.

    Source: VT-PTQ, Liu et al. 2021, section "Nuclear Norm Based Mixed Precision".
    """

    name: str
    kind: str
    bits: int
    output_error: float
    correlation: float
    squared_error: float
    nuclear_norm: float
    nuclear_sensitivity: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Sensitivity:
        """Read what `to_dict` gave.

        Raises:
            AllocationError: keys are missing, or values are of another type.
        """
        kinds = {"name": str, "kind": str, "bits": int}
        for field in fields(cls):
            if not isinstance(table.get(field.name), kinds.get(field.name, float | int)):
                raise AllocationError(f"{field.name} = {table.get(field.name)!r} of a sensitivity is not what it was")
        return cls(**{field.name: table[field.name] for field in fields(cls)})


def measure(
    models: Mapping[int, QuantizedModel],
    parts: Mapping[int, Sequence[Part]],
    data: Iterable[Tensor],
    progress: Progress = silent,
) -> list[Sensitivity]:
    """Quantize every part by itself, in each of its bit widths, and compare with the float model.

    For each part and bit width an image goes through all that stands behind the part, and for each bit width once
    through the float model; memory does not grow with the images.

    Arguments:
        models: the calibrated model of each bit width, all of one float function.
        parts: of each bit width, with the same outputs in all.
        data: the calibration batches.
        progress: told how many parts of how many are done in a batch.

    Returns:
        One for each part and bit width, parts of a bit width together, in the order given.

    Raises:
        CalibrationError: no data.
    """
    sums = {(bits, part.name): _Sums() for bits, some in parts.items() for part in some}
    with torch.inference_mode():
        for images in (chunk for batch in data for chunk in batch.split(_IMAGES_AT_ONCE)):
            done, norms = 0, {}
            for bits, some in parts.items():
                model = models[bits]
                known = {part.name: model.known_before(part.values) for part in some}
                outputs = list(dict.fromkeys(part.output for part in some))
                held, floats = _floats(model, images, outputs, {node for each in known.values() for node in each})
                norms = norms or {output: _nuclear_norms(floats[output]) for output in outputs}
                for part in some:
                    progress("measuring", done, len(sums))
                    found: dict[str, Tensor] = {}
                    before = {node: held[node] for node in known[part.name]}
                    model.resume(before, part.values, _taps(model, len(images), [part.output], found))
                    sums[bits, part.name].add(found, floats, part.output, _logits(model), norms[part.output])
                    done += 1
            progress("measuring", done, len(sums))
    if not all(each.images for each in sums.values()):
        raise CalibrationError("no calibration images: give at least one batch")
    return [sums[bits, part.name].means(part.name, part.kind, bits) for bits, some in parts.items() for part in some]


class _Sums:
    """Over images, of what a sensitivity is the mean of."""

    def __init__(self) -> None:
        self.images = 0
        self._logits = self._change = self._correlation = self._error = self._norm = self._product = 0.0

    def add(
        self, found: Mapping[str, Tensor], floats: Mapping[str, Tensor], output: str, logits: str, norms: Tensor
    ) -> None:
        y = floats[output]
        errors = (found[output] - y).double().square().flatten(1).sum(1)
        self.images += len(y)
        self._logits += float(floats[logits].double().square().sum())
        self._change += float((found[logits] - floats[logits]).double().square().sum())
        self._correlation += float(correlation(y, found[output]).sum())
        self._error += float(errors.sum())
        self._norm += float(norms.sum())
        self._product += float((errors * norms).sum())

    def means(self, name: str, kind: str, bits: int) -> Sensitivity:
        change = self._change / self._logits if self._logits else 0.0
        rest = (self._correlation, self._error, self._norm, self._product)
        return Sensitivity(name, kind, bits, change, *(each / self.images for each in rest))


def _logits(model: QuantizedModel) -> str:
    """The operand that is the model's output."""
    return next(f"{site.name}:input" for site in model.sites if site.kind == "output")


def _floats(
    model: QuantizedModel, images: Tensor, outputs: Sequence[str], nodes: Collection[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What some graph nodes give in the float model, and what parts and the model compute."""
    held: dict[str, Any] = {}
    found: dict[str, Tensor] = {}

    def hold(node: str) -> Callable[[Any], None]:
        return lambda x: held.__setitem__(node, tree_map_only(Tensor, Tensor.clone, x))  # parts of a split, and sizes

    nodes_and_outputs = [*((node, hold(node)) for node in nodes), *_taps(model, len(images), outputs, found)]
    model.run(images, {}, quantized=False, nodes=nodes_and_outputs)
    return held, found


def _taps(model: QuantizedModel, images: int, outputs: Sequence[str], into: dict[str, Tensor]) -> list[tuple[str, Tap]]:
    """Taps that put what parts compute, and the logits, as (images, ..., rows, columns); quantized, where they are."""
    sites = {site.name: site for site in model.sites}
    shapes = {node.name: node.meta["shape"] for node in model.graph_module.graph.nodes if "shape" in node.meta}

    def hold(output: str, shape: Sequence[int], kind: str) -> Callable[[Tensor], None]:
        def tap(x: Tensor) -> None:
            x = x.movedim(list(shape).index(-1), 0).unflatten(0, (images, -1))
            into[output] = (x.flatten(-2) if kind == "conv" and x.ndim > 4 else x).clone()

        return tap

    taps = []
    for output in dict.fromkeys((*outputs, _logits(model))):
        name, _, operand = output.rpartition(":")
        site = sites[name or output]
        node = site.operands[operand] if name else site.node
        taps.append((model.read_as(node), hold(output, shapes[node], site.kind)))
    return taps


def _nuclear_norms(x: Tensor) -> Tensor:
    """The sum of the singular values of each image's matrices: float64 (images,)."""
    matrices = x.float().flatten(1, -3) if x.ndim > 3 else x.float()[:, None]
    return torch.linalg.svdvals(matrices).double().flatten(1).sum(1)

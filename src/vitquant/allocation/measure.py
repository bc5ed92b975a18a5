"""Measuring how much a model's outputs change when only one part of it is quantized."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vitquant.errors import AllocationError, CalibrationError
from vitquant.graph.kinds import KINDS
from vitquant.graph.segments import IMAGES, Segment
from vitquant.graph.taps import by_image
from vitquant.model import QuantizedModel
from vitquant.objectives.correlation import correlation
from vitquant.progress import Progress, silent
from vitquant.schema import Number, Table, Text, check

_IMAGES_AT_ONCE = 8
_HELD = 1 << 30  # bytes for the float outputs and inputs of all parts


@dataclass(frozen=True)
class Part:
    """A part of the model that is quantized by itself, and the tensor at which the effect is measured.

    Arguments:
        name: of the site or module.
        kind: the site's kind, or `module`.
        bits: a text for the report: the module's width, or the widths of the site's operands.
        values: the names of the values that are quantized.
        output: the name of the tensor that is compared with float, `SITE` or `SITE:OPERAND`.
    """

    name: str
    kind: str
    bits: str
    values: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivity of one part at one bit width, as means over images.

    Arguments:
        name, kind: of the part.
        bits: the module's width, or those of a site's operands, in their order.
        output_error: the squared error of the model's output relative to the square of the float output; the mean over
            several outputs.
        correlation: Pearson's correlation of the part's own output with its float output.
        squared_error: the squared error of the part's own output, summed over its elements.
        nuclear_norm: the sum of the singular values of the part's float output, over all of its matrices.
        nuclear_sensitivity: the product of `squared_error` and `nuclear_norm` for each image, Omega in the paper.

    Source: VT-PTQ, Liu et al. 2021, section "Nuclear Norm Based Mixed Precision".
    """

    name: str
    kind: str
    bits: str
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
        """Read what `to_dict` returned.

        Raises:
            AllocationError: keys are missing or unknown, or values do not fit.
        """
        return cls(**check(table, SENSITIVITY, AllocationError))


_ERROR = Number(0.0, 1e100)
SENSITIVITY = Table(
    {
        **dict.fromkeys(("name", "kind", "bits"), Text()),
        **dict.fromkeys(("output_error", "squared_error", "nuclear_norm", "nuclear_sensitivity"), _ERROR),
        "correlation": Number(-1.001, 1.001),  # with room for rounding
    }
)


def measure(
    model: QuantizedModel,
    parts: Sequence[Part],
    data: Iterable[Tensor],
    progress: Progress = silent,
) -> list[Sensitivity]:
    """Quantize every part by itself, and compare with the float model.

    It takes one float forward pass, and for each part a pass through the rest of the model after it; memory does not
    grow with the number of images.

    Arguments:
        model: calibrated, its operations in float.
        parts: of the model.
        data: the calibration batches.
        progress: called with the number of parts done for a chunk of images and the number of all parts.

    Returns:
        The sensitivity of each part, in their order.

    Raises:
        CalibrationError: no data; or a part, named in the message, gives NaN or infinity.
    """
    sums = {part.name: _Sums() for part in parts}
    ends = tuple(f"{site.name}:input" for site in model.sites if site.kind == "output")
    segments = {part.name: model.downstream_segment(part.values, (part.output, *ends)) for part in parts}
    outputs = list(dict.fromkeys(part.output for part in parts))
    known = dict.fromkeys(name for each in segments.values() for name in each.inputs)
    whole = model.segment(IMAGES, list(dict.fromkeys((*ends, *outputs, *known))), quantized=False)
    with torch.inference_mode():
        for images in _chunks(data, _bytes_of_image(whole)):
            held = dict(zip(whole.outputs, whole(images), strict=True))
            floats = {name: _by_image(model, whole, name, held[name], len(images)) for name in (*ends, *outputs)}
            norms = {output: _nuclear_norms(floats[output], output) for output in outputs}
            for done, part in enumerate(parts):
                progress("measuring", done, len(parts))
                segment = segments[part.name]
                found = dict(zip(segment.outputs, segment(*(held[name] for name in segment.inputs)), strict=True))
                found = {name: _by_image(model, whole, name, x, len(images)) for name, x in found.items()}
                sums[part.name].add(found, floats, part.output, ends, norms[part.output])
            progress("measuring", len(parts), len(parts))
    if not all(each.images for each in sums.values()):
        raise CalibrationError("no calibration images: give at least one batch")
    return [sums[part.name].means(part) for part in parts]


def _chunks(data: Iterable[Tensor], bytes_of_image: int) -> Iterator[Tensor]:
    """Batches split into chunks so small that the cached tensors fit into the memory."""
    size = max(1, min(_IMAGES_AT_ONCE, _HELD // max(1, bytes_of_image)))
    return (chunk for batch in data for chunk in batch.split(size))


def _bytes_of_image(whole: Segment) -> int:
    """The bytes of the cached tensors for one image; windows along the batch axis are counted only once."""
    return 4 * sum(math.prod(size for size in shape if size > 0) for shape in whole.shapes.values())


class _Sums:
    """The sums over images from which a sensitivity is computed."""

    def __init__(self) -> None:
        self.images = 0
        self._squares: dict[str, float] = {}  # of each of the model's outputs
        self._changes: dict[str, float] = {}
        self._correlation = self._error = self._norm = self._product = 0.0

    def add(
        self,
        found: Mapping[str, Tensor],
        floats: Mapping[str, Tensor],
        output: str,
        ends: Sequence[str],
        norms: Tensor,
    ) -> None:
        y = floats[output]
        errors = (found[output].double() - y.double()).square().flatten(1).sum(1)
        self.images += len(y)
        for end in ends:
            square = float(floats[end].double().square().sum())
            change = float((found[end].double() - floats[end].double()).square().sum())
            self._squares[end] = self._squares.get(end, 0.0) + square
            self._changes[end] = self._changes.get(end, 0.0) + change
        self._correlation += float(correlation(y, found[output]).sum())
        self._error += float(errors.sum())
        self._norm += float(norms.sum())
        self._product += float((errors * norms).sum())

    def means(self, part: Part) -> Sensitivity:
        changes = [self._changes[end] / square if square else 0.0 for end, square in self._squares.items()]
        change = sum(changes) / len(changes)
        rest = [each / self.images for each in (self._correlation, self._error, self._norm, self._product)]
        if not all(map(math.isfinite, (change, *rest))):
            raise CalibrationError(f"{part.name}: NaN or infinity when it is quantized to {part.bits} bits")
        return Sensitivity(part.name, part.kind, part.bits, change, *rest)


def _by_image(model: QuantizedModel, whole: Segment, name: str, x: Tensor, images: int) -> Tensor:
    """A part's tensor, or an output of the model, as matrices (images, ..., rows, columns)."""
    kind = model.index.site(name.partition(":")[0]).kind
    x = by_image(x, whole.shapes[name].index(-1), images)
    if kind == "conv" and x.ndim > 4:
        return x.flatten(-2)  # channels and places
    if not KINDS[kind].map and x.ndim > 2:
        return x.flatten(1, -2)  # tokens and channels
    return x


def _nuclear_norms(x: Tensor, output: str) -> Tensor:
    """The sum of the singular values of each image's matrices: float64 (images,)."""
    if not bool(torch.isfinite(x).all()):
        raise CalibrationError(f"{output}: NaN or infinity in the float model")
    matrices = x.float().flatten(1, -3) if x.ndim > 3 else x.float()[:, None]
    return torch.linalg.svdvals(matrices).double().flatten(1).sum(1)

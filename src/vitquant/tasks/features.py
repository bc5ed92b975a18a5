"""Comparison of a model's features with those of its float model, on the same images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitquant.calibration_data import Batch, images_of
from vitquant.errors import DataError, ModelError
from vitquant.graph.outputs import matched, named_tensors
from vitquant.progress import Progress, silent
from vitquant.tasks.images import ImageBatches
from vitquant.tasks.running import evaluating, place_of, run_on

BANK = 2048  # images among which nearest neighbours are searched


@dataclass(frozen=True)
class FeaturesOf:
    """The comparison of one output with that of the float model.

    Arguments:
        name: of the output, see `graph.outputs.named_tensors`.
        shape: of the output for one image.
        cosine: the cosine similarity over all elements of an image, the mean over images.
        lowest_cosine: the smallest cosine similarity of an image.
        neighbours: per cent of the images with the same nearest neighbour by both models' features; None for single
            numbers, for maps (channels, height, width) and other outputs of rank 3 or more, and for fewer than three
            images.
    """

    name: str
    shape: tuple[int, ...]
    cosine: float
    lowest_cosine: float
    neighbours: float | None


@dataclass(frozen=True)
class FeaturesResult:
    """The figures of one evaluation.

    Arguments:
        engine: the engine that computed the features, e.g. `simulated`.
        images: the number of images.
        outputs: the comparison of each output, in the model's order.
        seconds: spent in the evaluated model alone.
    """

    engine: str
    images: int
    outputs: tuple[FeaturesOf, ...]
    seconds: float

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks to show with the figures, one line each."""
        small = [each.name for each in self.outputs if each.neighbours is None and len(each.shape) in (1, 2)]
        return ("nearest neighbours are compared among three images or more",) if small else ()


def evaluate(
    model: Callable[[Tensor], Any],
    float_model: Callable[[Tensor], Any] | None,
    batches: Iterable[Batch],
    progress: Progress = silent,
    engine: str = "simulated",
) -> FeaturesResult:
    """Run a model and its float model over images, and compare their outputs.

    The nearest neighbour of an image is the one among the first 2,048 images, except itself, whose features have the
    largest cosine similarity to its own, so that memory does not grow with the images. For tokens, (images, tokens,
    channels), the features are their mean.

    Arguments:
        model, float_model: modules (run in eval mode, on their own device) or any callables that return one or more
            tensors whose first axis is the images.
        batches: images, float32 (batch, channels, height, width), or batches that contain them, as for `quantize`.
        progress: called after each batch with the number of images done and the total, 0 if that is not known.

    Raises:
        ModelError: there is no float model, or the models do not return finite tensors of the same shapes (the first
            such image is named).
        DataError: there are no images.
    """
    if float_model is None:
        raise ModelError("features are compared with those of the float model, which is not there")
    compared: list[_Compared] = []
    done, seconds = 0, 0.0
    with evaluating(model, float_model):
        for batch in batches:
            images = images_of(batch)
            started = time.perf_counter()
            given = {name: each.cpu() for name, each in named_tensors(run_on(model, images)).items()}  # synchronizes
            seconds += time.perf_counter() - started
            expected = {name: each.cpu() for name, each in named_tensors(run_on(float_model, images)).items()}
            found = matched(given, tuple(expected))
            _check(list(found.values()), list(expected.values()), len(images), batches, done)
            compared = compared or [_Compared(name, tuple(each.shape[1:])) for name, each in expected.items()]
            if [(each.name, each.shape) for each in compared] != [(n, tuple(x.shape[1:])) for n, x in expected.items()]:
                raise ModelError("the float model gives other tensors for some batches than for others")
            for each in compared:
                each.add(found[each.name], expected[each.name])
            done += len(images)
            progress("evaluating", done, len(batches.items) if isinstance(batches, ImageBatches) else 0)
    if not done:
        raise DataError("no images to evaluate on")
    return FeaturesResult(engine, done, tuple(each.result(done) for each in compared), seconds)


class _Compared:
    """The sums from which the figures of one output are computed, over the images so far."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape
        self.cosine, self.lowest, self.same = 0.0, 1.0, 0
        self.banks: tuple[Tensor, Tensor] | None = None
        self.pairs: list[tuple[Tensor, Tensor]] = []  # features of the images of the bank, until it is full

    def add(self, found: Tensor, expected: Tensor) -> None:
        rows = [x.double().reshape(len(x), -1) for x in (found, expected)]
        cosines = torch.cosine_similarity(rows[0], rows[1])
        cosines[(rows[0] == rows[1]).all(1)] = 1.0  # also of zeros, which have no direction
        self.cosine += float(cosines.sum())
        self.lowest = min(self.lowest, float(cosines.min()))
        if len(self.shape) not in (1, 2):
            return
        pair = _directions(found), _directions(expected)
        if self.banks is None:
            self.pairs.append(pair)
            if sum(len(each) for each, _ in self.pairs) >= BANK:
                self._fill_banks()
        else:
            self.same += int((_nearest(pair[0], self.banks[0]) == _nearest(pair[1], self.banks[1])).sum())

    def result(self, images: int) -> FeaturesOf:
        if self.pairs:
            self._fill_banks()
        compares = len(self.shape) in (1, 2) and images > 2
        neighbours = 100 * self.same / images if compares else None
        return FeaturesOf(self.name, self.shape, self.cosine / images, self.lowest, neighbours)

    def _fill_banks(self) -> None:
        """Make the bank of the first images, to which later images are compared, and compare these with each other."""
        found, expected = (torch.cat(side) for side in zip(*self.pairs, strict=True))
        self.pairs = []
        self.banks = found[:BANK], expected[:BANK]
        own = torch.arange(len(found))
        self.same += int((_nearest(found, self.banks[0], own) == _nearest(expected, self.banks[1], own)).sum())


def _directions(x: Tensor) -> Tensor:
    """The features of each image, or the mean of its tokens, normalized to length one: float32 (images, channels)."""
    return torch.nn.functional.normalize(x.float() if x.ndim == 2 else x.float().mean(1), dim=1)


def _nearest(x: Tensor, bank: Tensor, own: Tensor | None = None) -> Tensor:
    """The position in the bank with the largest cosine similarity; among equals the first.

    Arguments:
        own: the position of each image itself, which is excluded, if it may be in the bank.
    """
    similar = x @ bank.T
    if own is not None:
        inside = own < len(bank)
        similar[own[inside], own[inside]] = -2.0
    return similar.max(1).indices


def _check(found: list[Tensor], expected: list[Tensor], images: int, batches: Iterable[Any], done: int) -> None:
    shapes, wanted = ([tuple(each.shape) for each in side] for side in (found, expected))
    if shapes != wanted or not shapes or any(shape[:1] != (images,) for shape in shapes):
        raise ModelError(
            f"the model gives tensors of shape {shapes} for {images} images, the float model {wanted}; the same are "
            "compared, whose first axis is the images"
        )
    for who, side in (("the model", found), ("the float model", expected)):
        for each in side:
            finite = each.isfinite().reshape(images, -1).all(dim=1)
            if not finite.all():
                name = place_of(batches, done + int(finite.logical_not().nonzero()[0]))
                raise ModelError(f"{who} gives NaN or infinity, first for {name}; check its weights and calibration")

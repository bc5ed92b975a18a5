"""Calibration images for methods: batches in any of the accepted forms, checked, counted and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from vitquant.errors import CalibrationError

Batch = torch.Tensor | Sequence[Any] | Mapping[str, torch.Tensor]


class CalibrationData:
    """Batches of images on a device, which are counted and hashed in the first iteration over them.

    Arguments:
        data: batches, as for `quantize`.
        device: where they are moved to; the device of the first batch when None.

    Attributes:
        example: the first two images.
        first: the sha256 of the first batch.
        images, digest: the number of images and the sha256 of all of them; known after the first iteration.

    Raises:
        CalibrationError: there are no batches, or the first is not a batch of images.
    """

    def __init__(self, data: Iterable[Batch], device: torch.device | None) -> None:
        batches = iter(batches_of(data))
        first = next(batches, None)
        if first is None:
            raise CalibrationError("no calibration images: give at least one batch")
        images = images_of(first)
        self._data, self._begun = data, chain([first], batches)
        self._first: Batch = first
        self._once = batches is data
        self._device, self._dtype = images.device if device is None else device, images.dtype
        self.example, self.first = images[:2].to(self._device), _sha256(images).hexdigest()
        self.images, self.digest = 0, ""

    def check(self, passes: int, labels: bool) -> None:
        """Refuse data that do not meet the needs of the methods, before iterating over them.

        Arguments:
            passes: how many times methods will iterate over the data.
            labels: whether methods need the classes of the images.

        Raises:
            CalibrationError: the data do not meet the needs; the message says what to give.
        """
        if passes > 1 and self._once:
            raise CalibrationError(
                "the recipe reads the calibration images more than once, and these can be read once only; "
                "give a list of batches or a DataLoader"
            )
        if labels:
            labels_of(self._first)
        self._first = ()  # release the batch

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self.images_of(batch).to(self._device) for batch in self.batches())

    def labelled(self) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """The batches with the classes of their images, (batch,) int64."""
        return _Labelled(self)

    def batches(self) -> Iterator[Batch]:
        if self._begun is None:
            yield from self._data
            return
        batches, self._begun = self._begun, None
        images, digest = 0, hashlib.sha256()
        for batch in batches:
            found = self.images_of(batch)
            images += len(found)
            digest.update(_bytes(found))
            yield batch
        self.images, self.digest = images, digest.hexdigest()

    def images_of(self, batch: Batch) -> torch.Tensor:
        images = images_of(batch)
        if images.dtype != self._dtype:
            raise CalibrationError(
                f"a calibration batch is of {images.dtype} and the first of {self._dtype}: give all of one precision"
            )
        return images


class RepeatedBatches:
    """Batches that have to be the same, in the same order, each time they are iterated over.

    Arguments:
        data: batches of images, (batch, channels, height, width).

    Attributes:
        digest: of all images, once they have been iterated over.

    Raises:
        CalibrationError: while iterating: a batch is another one than before, or their number differs.
    """

    def __init__(self, data: Iterable[torch.Tensor]) -> None:
        self._data = data
        self._seen: list[str] | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256(" ".join(self._seen or ()).encode()).hexdigest()

    def __iter__(self) -> Iterator[torch.Tensor]:
        found: list[str] = []
        for images in self._data:
            found.append(_sha256(images).hexdigest())
            if self._seen is not None and self._seen[len(found) - 1 : len(found)] != found[-1:]:
                raise self._other()
            yield images
        if self._seen is not None and len(found) < len(self._seen):
            raise self._other()
        self._seen = found

    def _other(self) -> CalibrationError:
        return CalibrationError(
            "the batches are others each time they are iterated over: give shuffle = False and no random augmentation"
        )


class _Labelled:
    def __init__(self, data: CalibrationData) -> None:
        self._data = data

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        device = self._data.example.device
        return ((self._data.images_of(b).to(device), labels_of(b).to(device)) for b in self._data.batches())


def _sha256(images: torch.Tensor) -> Any:
    return hashlib.sha256(_bytes(images))


def _bytes(images: torch.Tensor) -> memoryview:
    return images.detach().cpu().contiguous().view(torch.uint8).numpy().data


def labels_of(batch: Batch) -> torch.Tensor:
    """The classes of a batch's images: int64 (batch,).

    Raises:
        CalibrationError: the batch has none.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(batch, Sequence) and len(batch) > 1:
        labels = batch[1]
    if not isinstance(labels, torch.Tensor) or labels.shape != (len(images_of(batch)),):
        raise CalibrationError("labels are needed: give batches (images, labels), labels int64 (batch,)")
    return labels.to(torch.int64)


def batches_of(data: Iterable[Batch]) -> Iterable[Batch]:
    """The data, after checking that they are an iterable of batches.

    Raises:
        CalibrationError: they are a single tensor or mapping, or not iterable.
    """
    if isinstance(data, torch.Tensor | Mapping):
        raise CalibrationError(f"the calibration data is one {type(data).__name__}: give a list of batches, [data]")
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise CalibrationError(
            f"the calibration data is of type {type(data).__name__}: give a list of batches or a DataLoader"
        )
    return data


def images_of(batch: Batch) -> torch.Tensor:
    """The images of a batch in any form that `quantize` accepts.

    Raises:
        CalibrationError: it is not a batch of images.
    """
    images: Any = batch
    if isinstance(batch, Mapping):
        images = batch.get("pixel_values", next(iter(batch.values()), ()))
    elif isinstance(batch, Sequence) and batch:
        images = batch[0]
    if not isinstance(images, torch.Tensor):
        got = type(batch).__name__ if images is batch else f"{type(batch).__name__} of {type(images).__name__}"
    elif images.ndim != 4:
        got = f"a tensor of {images.ndim} dimensions, {list(images.shape)}"
    elif not images.is_floating_point():
        got = f"a tensor of {images.dtype}"
    elif not images.numel():
        got = f"an empty one, {list(images.shape)}"
    else:
        return images
    raise CalibrationError(
        "a calibration batch is a float tensor (batch, channels, height, width), a tuple that begins with one, "
        f"or a mapping with pixel_values; got {got}"
    )

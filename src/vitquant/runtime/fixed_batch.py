"""Running a model with a fixed batch size on any number of images."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from vitquant.errors import ExportError


@contextmanager
def held_at_once(size: int) -> Generator[None]:
    """Raise an ExportError when memory runs out, whichever library tried to allocate it.

    Arguments:
        size: the number of images in a batch, for the message.

    Raises:
        ExportError: there is not enough memory.
    """
    try:
        yield
    except Exception as error:  # torch and ONNX Runtime raise no MemoryError
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        raise ExportError(
            f"the memory does not hold a batch of {size} images; give fewer at once, or export with a smaller --batch "
            "(batch=...)"
        ) from error


def in_batches(run: Callable[[Tensor], Sequence[Tensor]], images: Tensor, size: int) -> list[Tensor]:
    """The results of `run` for images, `size` at a time; zeros pad the last batch, and their results are dropped.

    Arguments:
        run: maps images (size, ...) to tensors (size, ...).
        images: (images, ...), at least one.
        size: the batch size.

    Raises:
        ExportError: there is not enough memory for a batch.

    Pitfall: results are concatenated and cut along their first axis, unless there are exactly `size` images.
    """
    with held_at_once(size):
        if len(images) == size:
            return list(run(images))
        missing = -len(images) % size
        filled = torch.cat([images, images.new_zeros((missing, *images.shape[1:]))]) if missing else images
        parts = [run(part) for part in filled.split(size)]
        return [torch.cat(each)[: len(images)] for each in zip(*parts, strict=True)]

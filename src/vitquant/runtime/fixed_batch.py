"""Files that take a fixed number of images at once, run on any number."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from vitquant.errors import ExportError


@contextmanager
def held_at_once(size: int) -> Generator[None]:
    """What the memory does not hold becomes an error of ours, whichever library asked for it.

    Arguments:
        size: images in a batch.

    Raises:
        ExportError: there is not enough memory.
    """
    try:
        yield
    except Exception as error:  # torch and ONNX Runtime have no type for it
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        raise ExportError(
            f"the memory does not hold a batch of {size} images; give fewer at once, or export with a smaller --batch "
            "(batch=...)"
        ) from error


def in_batches(run: Callable[[Tensor], Sequence[Tensor]], images: Tensor, size: int) -> list[Tensor]:
    """What `run` gives for images, `size` of them at once; zeros fill up the last batch, and leave no result.

    Arguments:
        run: from (size, ...) to tensors (size, ...).
        images: (images, ...), at least one.

    Raises:
        ExportError: the memory does not hold as many at once.

    Pitfall: results are joined and cut along their first axis, unless there are as many images as `size`.
    """
    with held_at_once(size):
        if len(images) == size:
            return list(run(images))
        missing = -len(images) % size
        filled = torch.cat([images, images.new_zeros((missing, *images.shape[1:]))]) if missing else images
        parts = [run(part) for part in filled.split(size)]
        return [torch.cat(each)[: len(images)] for each in zip(*parts, strict=True)]

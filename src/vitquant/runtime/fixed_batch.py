"""Files that take a fixed number of images at once, run on any number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def in_batches(run: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """What `run` gives for images, `size` of them at once; zeros fill up the last batch, and leave no result.

    Arguments:
        run: from (size, ...) to (size, ...).
        images: (images, ...), at least one.

    Pitfall: results are joined and cut along their first axis, unless there are as many images as `size`.
    """
    if len(images) == size:
        return run(images)
    missing = -len(images) % size
    filled = torch.cat([images, images.new_zeros((missing, *images.shape[1:]))]) if missing else images
    return torch.cat([run(part) for part in filled.split(size)])[: len(images)]

"""Running models for evaluation, for any task."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitquant.tasks.images import ImageBatches


def run_on(model: Any, images: Tensor) -> Any:
    """The output of a model for images, which are moved to its device."""
    if isinstance(model, nn.Module):
        tensor = next(model.parameters(), next(model.buffers(), None))
        images = images if tensor is None else images.to(tensor.device)
    return model(images)


def place_of(batches: Iterable[Any], position: int) -> str | Path:
    """The name of the image at a position, for messages."""
    return batches.path(position) if isinstance(batches, ImageBatches) else f"image {position}"


@contextmanager
def evaluating(*models: object) -> Generator[None]:
    """A context without gradients, in which modules are in evaluation mode."""
    modules = [module for model in models if isinstance(model, nn.Module) for module in model.modules()]
    modes = [module.training for module in modules]
    for model in models:
        if isinstance(model, nn.Module):
            model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode

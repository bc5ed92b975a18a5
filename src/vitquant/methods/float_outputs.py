"""The float model's outputs, against which losses of the quantized model's are measured."""

from __future__ import annotations

import torch
from torch import Tensor

from vitquant.errors import CalibrationError
from vitquant.graph.captured import CapturedModel
from vitquant.graph.parts import in_parts
from vitquant.graph.segments import IMAGES
from vitquant.methods.recomputed import by_images


class FloatOutputs:
    """Computes all outputs of a float model for a batch.

    Arguments:
        teacher: the float model.
        loss: one of `OUTPUT_LOSSES`, for which they are references.
    """

    def __init__(self, teacher: CapturedModel, loss: str) -> None:
        self._compute = teacher.segment(IMAGES, [site.name for site in teacher.sites if site.kind == "output"])
        self._loss = loss

    def __call__(self, images: Tensor, name: str) -> tuple[Tensor, ...]:
        """The outputs, each as (images, ...).

        Arguments:
            images: (batch, channels, height, width).
            name: of the batch, for messages.

        Raises:
            CalibrationError: the batch has one image, which has no negatives for `infonce`.
        """
        if self._loss == "infonce" and len(images) < 2:
            raise CalibrationError(
                f"{name} has one image, and infonce compares every image with the others of its batch: "
                "give batches of at least two, or another number of images"
            )
        with torch.inference_mode():
            return by_images(self._compute, in_parts(self._compute, [images], len(images)), len(images))

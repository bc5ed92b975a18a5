"""Two forms of a model on the same images, and what one may promise about them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

FARTHEST = 0.5  # 1 - cosine that rounding may explain
AGREEMENT = 98.0  # per cent of images that the integer program gives the float64 simulation's class
FLIPPED_IMAGES = 1  # that may always differ: of few images one is more than 2 %, and one flips in a correct model
ALONE = 0.9  # cosine with the simulation that is asked for when the float model is not there to compare with


@dataclass(frozen=True)
class Comparison:
    """Two forms of a model on the same images.

    Arguments:
        form, beside: which.
        images: how many.
        agreement: per cent of them that both give the same class.
        identical: per cent of them whose logits are the same, bit for bit.
        cosine: of the logits, the mean over images.
        worst: the largest difference of a logit.
        promise: what has to hold, in words; empty when nothing is promised.
        kept: whether it does.
    """

    form: str
    beside: str
    images: int
    agreement: float
    identical: float
    cosine: float
    worst: float
    promise: str = ""
    kept: bool = True


def compare(form: str, logits: Tensor, beside: str, reference: Tensor) -> Comparison:
    """Two forms of a model by their logits, (images, classes)."""
    logits, reference = logits.double(), reference.double()
    return Comparison(
        form,
        beside,
        len(logits),
        agreement=100 * (_classes(logits) == _classes(reference)).double().mean().item(),
        identical=100 * (logits == reference).all(1).double().mean().item(),
        cosine=torch.cosine_similarity(logits, reference, dim=1).mean().item(),
        worst=(logits - reference).abs().max().item(),
    )


def bit_exact(comparison: Comparison) -> Comparison:
    """With the promise that both forms give the same bits."""
    return replace(comparison, promise="bit for bit", kept=comparison.identical == 100)


def same_classes(comparison: Comparison) -> Comparison:
    """With the promise that nearly all images get the same class: all but 2 %, or but one where that is more."""
    different = round(comparison.images * (1 - comparison.agreement / 100))
    kept = different <= max(FLIPPED_IMAGES, comparison.images * (1 - AGREEMENT / 100))
    return replace(comparison, promise=f"at least {AGREEMENT:g} % agree, or all but {FLIPPED_IMAGES}", kept=kept)


def as_close_as(comparison: Comparison, usual: Comparison | None) -> Comparison:
    """With the promise that a form which rounds in its own way is no farther away than rounding explains.

    Arguments:
        usual: the simulation beside the float model; without one, a cosine of `ALONE` is asked for. Of two independent
            draws of rounding noise 1 - cosine is twice what each has beside what both round; four times is another
            model, and so is a cosine below one half, whatever quantization did.
    """
    most = 1 - ALONE if usual is None else min(4 * (1 - usual.cosine) + 1e-3, FARTHEST)
    return replace(comparison, promise=f"cosine at least {1 - most:.3f}", kept=comparison.cosine >= 1 - most)


def _classes(logits: Tensor) -> Tensor:
    """The class of each image; of equal logits, the first."""
    return logits.sort(dim=1, descending=True, stable=True).indices[:, 0]

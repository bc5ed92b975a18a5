"""Two forms of a model on the same images, and what one may promise about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FARTHEST = 0.5  # 1 - cosine that rounding may explain
AGREEMENT = 98.0  # per cent of images that the integer program gives the float64 simulation's answer
FLIPPED_IMAGES = 1  # that may always differ: of few images one is more than 2 %, and one flips in a correct model
ALONE = 0.9  # cosine with the simulation that is asked for when the float model is not there to compare with

Outputs = Mapping[str, Tensor]
Same = Callable[[Outputs, Outputs], Tensor]  # bool (images,)


@dataclass(frozen=True)
class Comparison:
    """Two forms of a model on the same images.

    Arguments:
        form, beside: which.
        images: how many.
        agreement: per cent of them that both give the same answer; None where the task knows no answers.
        identical: per cent of them whose outputs are the same, bit for bit.
        cosine: of the outputs, the mean over images; of several outputs that of the one where it is the smallest.
        worst: the largest difference of a number.
        promise: what has to hold, in words; empty when nothing is promised.
        kept: whether it does.
    """

    form: str
    beside: str
    images: int
    agreement: float | None
    identical: float
    cosine: float
    worst: float
    promise: str = ""
    kept: bool = True


def compare(form: str, found: Outputs, beside: str, reference: Outputs, same: Same | None) -> Comparison:
    """Two forms of a model by what they give.

    Arguments:
        form, beside: what they are called.
        found, reference: tensors (images, ...) by name, the same names and shapes.
        same: which images have the same answer in both; None where the task knows no answers.
    """
    pairs = [(_by_image(found[name]), _by_image(reference[name])) for name in reference]
    return Comparison(
        form,
        beside,
        len(pairs[0][0]),
        agreement=None if same is None else 100 * same(found, reference).double().mean().item(),
        identical=100 * torch.stack([(x == y).all(1) for x, y in pairs]).all(0).double().mean().item(),
        cosine=torch.stack([torch.cosine_similarity(x, y, dim=1).mean() for x, y in pairs]).min().item(),  # or NaN
        worst=torch.stack([(x - y).abs().max() for x, y in pairs]).max().item(),
    )


def bit_exact(comparison: Comparison) -> Comparison:
    """With the promise that both forms give the same bits."""
    return replace(comparison, promise="bit for bit", kept=comparison.identical == 100)


def same_answers(comparison: Comparison) -> Comparison:
    """With the promise that nearly all images have the same answer: all but 2 %, or but one where that is more."""
    assert comparison.agreement is not None
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


def _by_image(x: Tensor) -> Tensor:
    """All numbers of an image in a row: float64 (images, n)."""
    return x.double().reshape(len(x), -1)

"""The comparison of two forms of a model on the same images, and the criteria that it must meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FARTHEST = 0.5  # the largest 1 - cosine that is ascribed to rounding
AGREEMENT = 98.0  # per cent of images for which integer program and float64 simulation must give the same answer
FLIPPED_IMAGES = 1  # images that may always differ: one may flip in a correct model, and be more than 2 % of few images
ALONE = 0.9  # the cosine with the simulation that is required if there is no float model to compare with

Outputs = Mapping[str, Tensor]
Same = Callable[[Outputs, Outputs], Tensor]  # bool (images,)


@dataclass(frozen=True)
class Comparison:
    """The comparison of two forms of a model on the same images.

    Arguments:
        form, beside: the names of the form and of the one that it is compared with.
        images: the number of images.
        agreement: per cent of images with the same answer in both; None where the task has no answers.
        identical: per cent of images whose outputs are the same, bit for bit.
        cosine: the cosine similarity of the outputs, the mean over images; the smallest of several outputs.
        worst: the largest absolute difference of an element.
        promise: the criterion in words; empty when there is none.
        kept: whether it is met.
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
    """Compare two forms of a model by their outputs.

    Arguments:
        form, beside: the names of both forms.
        found, reference: their outputs, tensors (images, ...) by name, with the same names and shapes.
        same: maps both outputs to the images with the same answer; None where the task has no answers.
    """
    pairs = [(_by_image(found[name]), _by_image(reference[name])) for name in reference]
    return Comparison(
        form,
        beside,
        len(pairs[0][0]),
        agreement=None if same is None else 100 * same(found, reference).double().mean().item(),
        identical=100 * torch.stack([(x == y).all(1) for x, y in pairs]).all(0).double().mean().item(),
        cosine=torch.stack([_cosines(x, y).mean() for x, y in pairs]).min().item(),  # or NaN
        worst=torch.stack([(x - y).abs().max() for x, y in pairs]).max().item(),
    )


def bit_exact(comparison: Comparison) -> Comparison:
    """The comparison with the criterion that both outputs are the same bit for bit."""
    return replace(comparison, promise="bit for bit", kept=comparison.identical == 100)


def same_answers(comparison: Comparison) -> Comparison:
    """The comparison with the criterion that at most 2 % of the images, or one image, have different answers."""
    assert comparison.agreement is not None
    different = round(comparison.images * (1 - comparison.agreement / 100))
    kept = different <= max(FLIPPED_IMAGES, comparison.images * (1 - AGREEMENT / 100))
    return replace(comparison, promise=f"at least {AGREEMENT:g} % agree, or all but {FLIPPED_IMAGES}", kept=kept)


def as_close_as(comparison: Comparison, usual: Comparison | None) -> Comparison:
    """The comparison with the criterion that the forms differ no more than different rounding explains.

    Arguments:
        usual: the simulation compared with the float model; without it, a cosine of `ALONE` is required. For two
            independent draws of rounding noise, 1 - cosine is twice that of each draw to the unrounded output; more
            than four times is taken for another model, and so is a cosine below one half in any case.
    """
    most = 1 - ALONE if usual is None else min(4 * (1 - usual.cosine) + 1e-3, FARTHEST)
    return replace(comparison, promise=f"cosine at least {1 - most:.3f}", kept=comparison.cosine >= 1 - most)


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    """The cosine of each image's rows; 1 where they are equal, also of zeros, which have no direction."""
    return torch.where((x == y).all(1), 1.0, torch.cosine_similarity(x, y, dim=1))


def _by_image(x: Tensor) -> Tensor:
    """All numbers of an image in a row: float64 (images, n)."""
    return x.double().reshape(len(x), -1)

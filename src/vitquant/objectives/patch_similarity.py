"""How different the patches of an image are to an attention: the entropy of their similarities.

In an image of objects some patches are alike and others are not, so that the similarities spread; in noise all patches
are equally alike. Source: PSAQ-ViT, Li et al. 2022, section 3.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

BANDWIDTH, POINTS = 0.01, 10
BYTES_OF_A_PAIR = 24  # of patches in a window, while the entropy of an image or its gradient is computed
_FLOOR = 1e-4  # added to densities, so that their logarithm is finite
_LEAST_EXPONENT = -80.0
_AT_ONCE = 2**18  # similarities: what is computed from them stays in the processor's cache


def patch_entropy(features: Tensor, bandwidth: float = BANDWIDTH, points: int = POINTS) -> Tensor:
    """The differential entropy of the cosine similarities of all pairs of patches, one number for each image.

    Their density is estimated with a Gaussian kernel, f(t) = mean over the pairs of N(t - similarity; 0, bandwidth), at
    `points` positions from the smallest to the largest similarity of the image; the entropy is the integral of
    -f log f over them by the trapezoidal rule, of f + 1e-4. All ordered pairs count, those of a patch with itself too.

    Arguments:
        features: of any floating dtype, (images, windows, patches, channels); pairs are of patches in the same window.
        bandwidth: the standard deviation of the kernel.
        points: at least 2.

    Returns:
        (images,), float32, or float64 for float64 features; differentiable once. Positions have no gradient.

    Source: PSAQ-ViT, equations 6 to 9.

    Pitfall: points that are farther apart than the bandwidth see only a part of the similarities.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    density, positions = _Density.apply(functional.normalize(features, dim=-1), bandwidth, points)  # type: ignore[misc]
    found = density + _FLOOR
    return -torch.trapezoid(found * found.log(), positions)


class _Density(torch.autograd.Function):
    """The kernel density estimate of an image's similarities, in memory for one similarity each.

    The direct formula keeps a number for every point and pair for the backward pass. Here only the unit vectors are
    kept: similarities and kernels are computed again, a few images at a time. Similarities are symmetric, so that the
    pairs above the diagonal count twice; on it they are 1, without a gradient.
    """

    @staticmethod
    def forward(ctx: Any, unit: Tensor, bandwidth: float, points: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        _, windows, patches, _ = unit.shape
        share = 1 / (windows * patches**2 * bandwidth * math.sqrt(2 * math.pi))
        densities, positions = [], []
        pairs = _pairs(patches, unit.device)
        for part in _parts(unit):
            similar, same = _similarities(part, pairs), part.square().sum(-1).flatten(1)
            low, high = torch.cat([similar, same], 1).aminmax(dim=1, keepdim=True)
            at = torch.lerp(low, high, torch.linspace(0, 1, points, dtype=unit.dtype, device=unit.device))
            room = torch.empty_like(similar)
            above = torch.stack([_kernel(similar, t[:, None], bandwidth, room).sum(1) for t in at.unbind(1)], 1)
            on_it = _kernel(same[:, None], at[..., None], bandwidth).sum(2)
            densities.append((2 * above + on_it) * share)
            positions.append(at)
        density, at = torch.cat(densities), torch.cat(positions)
        ctx.save_for_backward(unit, at)
        ctx.bandwidth, ctx.share = bandwidth, share
        ctx.mark_non_differentiable(at)
        return density, at

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, of_positions: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        unit, positions = ctx.saved_tensors
        _, windows, patches, _ = unit.shape
        pairs = _pairs(patches, unit.device)
        gradients, done = [], 0
        for part in _parts(unit):
            here = slice(done, done := done + len(part))
            similar = _similarities(part, pairs)
            gradient, room, distance = (torch.zeros_like(similar) for _ in range(3))
            for t, weight in zip(positions[here, None].unbind(2), upstream[here, None].unbind(2), strict=True):
                torch.sub(t, similar, out=distance)
                gradient.addcmul_(_kernel(similar, t, ctx.bandwidth, room).mul_(distance), weight)
            whole = part.new_zeros(len(part), windows, patches**2)
            factor = 2 * ctx.share / ctx.bandwidth**2
            whole[..., pairs] = gradient.mul_(factor).unflatten(1, (windows, -1))
            square = whole.unflatten(-1, (patches, patches))
            gradients.append((square + square.mT) @ part)
        return torch.cat(gradients), None, None


def _parts(unit: Tensor) -> tuple[Tensor, ...]:
    _, windows, patches, _ = unit.shape
    return unit.split(max(1, _AT_ONCE // (windows * patches**2 // 2 + 1)))


def _pairs(patches: int, device: torch.device) -> Tensor:
    """Where a matrix of patches by patches has the pairs above its diagonal, in row-major order."""
    rows, columns = torch.triu_indices(patches, patches, 1, device=device)
    return rows * patches + columns


def _similarities(unit: Tensor, pairs: Tensor) -> Tensor:
    """(images, windows, patches, channels) -> (images, windows * pairs)."""
    return (unit @ unit.mT).flatten(2)[..., pairs].flatten(1)


def _kernel(values: Tensor, at: Tensor, bandwidth: float, room: Tensor | None = None) -> Tensor:
    """exp(-(values - at)^2 / (2 bandwidth^2)), but at least exp(-80), in the memory of `room` if it is given.

    That is nothing beside the floor of densities, while exponentials that become zero take seven times as long.
    """
    scaled = torch.sub(values, at, out=room).mul_(math.sqrt(0.5) / bandwidth)
    return scaled.square_().neg_().clamp_(min=_LEAST_EXPONENT).exp_()

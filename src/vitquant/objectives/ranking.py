"""The ranking loss of attention maps: whether quantization keeps which of two entries of a row is the larger."""

from __future__ import annotations

import torch
from torch import Tensor


def ranking_loss(a_hat: Tensor, a: Tensor, pairs: Tensor, theta: float) -> Tensor:
    """The mean of max(0, theta - (a_hat_i - a_hat_j) sign(a_i - a_j)) over rows and pairs of columns.

    Two entries that are equal in `a` have no order to keep: they give theta, whatever `a_hat` does.

    Arguments:
        a_hat: quantized map (images, ..., rows, columns).
        a: float map of the same shape.
        pairs: int64 (2, pairs), columns i and j.
        theta: the margin, in the map's units.

    Returns:
        float64 (images,), between 0 and theta + the largest difference in a row.

    Source: VT-PTQ, Liu et al. 2021, equation of L_ranking. The paper sums, beside a correlation of at most 1; here it
    is a mean, without which gamma = 0.1 would leave nothing of the correlation.
    """
    return hinge(differences(a_hat, pairs), torch.sign(differences(a, pairs)), theta)


def hinge(difference: Tensor, order: Tensor, theta: float) -> Tensor:
    """`ranking_loss` of differences (images, ..., rows, pairs), where `order` has the signs that they should have."""
    return (theta - difference * order).clamp_(min=0.0).flatten(1).mean(1, dtype=torch.float64)


def differences(a: Tensor, pairs: Tensor) -> Tensor:
    """a_i - a_j for the given pairs of columns: (..., rows, pairs)."""
    return a.index_select(-1, pairs[0]) - a.index_select(-1, pairs[1])


def column_pairs(columns: int, most: int, seed: int) -> Tensor:
    """All pairs i < j of columns, or a sample of them without repetition.

    Arguments:
        columns: of the map.
        most: how many pairs at most; 0 for all.
        seed: of the sample.

    Returns:
        int64 (2, pairs).
    """
    pairs = torch.triu_indices(columns, columns, offset=1)
    if not most or pairs.shape[1] <= most:
        return pairs
    chosen = torch.randperm(pairs.shape[1], generator=torch.Generator().manual_seed(seed))[:most]
    return pairs[:, chosen.sort().values]

"""The ranking loss of attention maps: whether quantization preserves the order of two entries of a row."""

from __future__ import annotations

import torch
from torch import Tensor


def ranking_loss(difference: Tensor, order: Tensor, theta: float) -> Tensor:
    """The mean of max(0, theta - (a_hat_i - a_hat_j) sign(a_i - a_j)) over rows and pairs of columns.

    Two entries that are equal in the float map have no order, and contribute the constant theta.

    Arguments:
        difference: a_hat_i - a_hat_j of the quantized map, (images, ..., pairs, rows); overwritten.
        order: sign(a_i - a_j) of the float map, of the same shape.
        theta: the margin, in the map's units.

    Returns:
        float64 (images,), between 0 and theta + the largest difference in a row.

    Source: VT-PTQ, Liu et al. 2021, equation of L_ranking. The paper has a sum; here it is a mean, since with
    gamma = 0.1 a sum would outweigh the correlation, which is at most 1.
    """
    short = difference.mul_(order).sub_(theta).clamp_(max=0.0).sum(-1)
    return -short.flatten(1).sum(1, dtype=torch.float64) / difference[0].numel()


def differences(a: Tensor, pairs: Tensor) -> Tensor:
    """a_i - a_j for the given pairs of columns of a map.

    Arguments:
        a: the map transposed, (..., columns, rows): picking rows is thirty times as fast as picking columns.
        pairs: int64 (2, pairs).

    Returns:
        (..., pairs, rows).
    """
    a = a.contiguous()
    return a.index_select(-2, pairs[0]).sub_(a.index_select(-2, pairs[1]))


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

"""The output of a product of two activations, and how candidates for its operands change it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitquant.objectives.correlation import IN_CACHE, Moments, Quantize
from vitquant.objectives.ranking import column_pairs, differences, hinge


@dataclass(frozen=True)
class Ranking:
    """How much the order within the rows of an attention map counts beside the correlation of outputs.

    Arguments:
        gamma: the weight of the loss; 0 leaves it out.
        theta: the margin of a pair, in the map's units.
        pairs: how many pairs of columns are compared in each row, drawn once; 0 for all.
        seed: of the draw.
    """

    gamma: float = 0.1
    theta: float = 0.2
    pairs: int = 256
    seed: int = 0


class ProductOutput:
    """The output of a matrix product, compared with what candidates for its operands would make of it.

    Arguments:
        left: float (images, ..., rows, depth).
        right: float (images, ..., depth, columns).
        factor: what the product is multiplied by to be an attention map; None where the map is the left operand.
        ranking: of the attention map.
    """

    def __init__(self, left: Tensor, right: Tensor, factor: float | None, ranking: Ranking) -> None:
        self.left, self.right, self.factor, self.ranking = left, right, factor, ranking
        columns = left.shape[-1] if factor is None else right.shape[-1]
        self._pairs = column_pairs(columns, ranking.pairs, ranking.seed).to(left.device)

    def of_operands(self, left: Sequence[Quantize], right: Sequence[Quantize]) -> Tensor:
        """The mean over images of correlation - gamma * ranking loss: float64 (candidates,).

        Arguments:
            left, right: quantizers of the operands: candidates of one, and the one that the other keeps.

        Source: VT-PTQ, Liu et al. 2021, the objective of the ranking-aware search.
        """
        count = max(len(left), len(right))
        found = torch.zeros(count, dtype=torch.float64, device=self.left.device)
        images = len(self.left)
        width = max(1, IN_CACHE // max(self.left[0].numel(), self.right[0].numel()))
        for start in range(0, images, width):
            part = slice(start, start + width)
            found += self._summed(self.left[part], self.right[part], left, right)
        return found / images

    def _summed(self, x: Tensor, z: Tensor, left: Sequence[Quantize], right: Sequence[Quantize]) -> Tensor:
        """The objective summed over some images."""
        y = (x @ z).flatten(1)
        sums = y.sum(1, dtype=torch.float64), (y * y).sum(1, dtype=torch.float64)
        ranked = self.ranking.gamma > 0 and bool(self._pairs.numel()) and (self.factor is not None or len(left) > 1)
        order = torch.sign(differences(self._map(x, y.view(*x.shape[:-1], -1)), self._pairs)) if ranked else None
        kept_left = left[0](x) if len(left) == 1 else None
        kept_right = right[0](z) if len(right) == 1 else None
        found = []
        for index in range(max(len(left), len(right))):
            xq = left[index](x) if kept_left is None else kept_left
            made = xq @ (right[index](z) if kept_right is None else kept_right)
            y_hat = made.flatten(1)
            sums_hat = (each.sum(1, dtype=torch.float64) for each in (y_hat, y_hat * y_hat, y * y_hat))
            score = Moments(y.shape[1], *sums, *sums_hat).correlation()
            if order is not None:
                loss = hinge(differences(self._map(xq, made), self._pairs), order, self.ranking.theta)
                score = score - self.ranking.gamma * loss
            found.append(score.sum())
        return torch.stack(found)

    def _map(self, left: Tensor, product: Tensor) -> Tensor:
        return left if self.factor is None else product * self.factor

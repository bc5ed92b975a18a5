"""The output of a product of two activations, and how candidates for its operands change it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitquant.objectives.correlation import IN_CACHE, FixedFactor, Moments, Quantize
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
        y = x @ z
        flat = y.flatten(1)
        sums = flat.sum(1, dtype=torch.float64), (flat * flat).sum(1, dtype=torch.float64)
        on_the_left = len(left) > 1
        fixed = right[0](z) if on_the_left else left[0](x)
        factor = FixedFactor(fixed.mT, y.mT) if on_the_left else FixedFactor(fixed, y)
        order = self._order(x, z, on_the_left)
        spread = None if self.factor is None else self._spread(fixed if on_the_left else z)
        found = []
        for quantize in left if on_the_left else right:
            candidate = quantize(x) if on_the_left else quantize(z)
            made = factor.sums(candidate.mT if on_the_left else candidate)
            score = Moments(flat.shape[1], *sums, *made).correlation()
            if order is not None:
                if spread is None:
                    difference = differences(candidate, self._pairs)
                else:
                    difference = candidate @ spread if on_the_left else fixed @ self._spread(candidate)
                score = score - self.ranking.gamma * hinge(difference, order, self.ranking.theta)
            found.append(score.sum())
        return torch.stack(found)

    def _order(self, x: Tensor, z: Tensor, on_the_left: bool) -> Tensor | None:
        """The signs that differences within the float map's rows have; None where no candidate changes the map."""
        if self.ranking.gamma == 0 or not self._pairs.numel() or (self.factor is None and not on_the_left):
            return None
        return torch.sign(differences(x, self._pairs) if self.factor is None else x @ self._spread(z))

    def _spread(self, z: Tensor) -> Tensor:
        """What the left operand is multiplied by to give the differences of the map: (..., depth, pairs)."""
        assert self.factor is not None
        return differences(z, self._pairs) * self.factor

"""The output of a product of two activations, and how candidate quantizers of its operands change it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitquant.objectives.correlation import IN_CACHE, FixedFactor, Moments, Quantize
from vitquant.objectives.ranking import column_pairs, differences, ranking_loss


@dataclass(frozen=True)
class Ranking:
    """The settings of the ranking loss of an attention map, which is subtracted from the correlation of outputs.

    Arguments:
        gamma: the weight of the loss; 0 leaves it out.
        theta: the margin of a pair, in the map's units.
        pairs: the number of pairs of columns that are compared, the same in each row; 0 for all.
        seed: of the draw of pairs.
    """

    gamma: float = 0.1
    theta: float = 0.2
    pairs: int = 256
    seed: int = 0


class ProductOutput:
    """The float output of a matrix product, to be compared with its outputs for candidate quantizers of its operands.

    Arguments:
        left: float (images, ..., rows, depth).
        right: float (images, ..., depth, columns).
        factor: the factor that makes the product an attention map; None where the map is the left operand.
        ranking: the settings of the ranking loss.
    """

    def __init__(self, left: Tensor, right: Tensor, factor: float | None, ranking: Ranking) -> None:
        self.left, self.right, self.factor, self.ranking = left, right, factor, ranking
        columns = left.shape[-1] if factor is None else right.shape[-1]
        self._pairs = column_pairs(columns, ranking.pairs, ranking.seed).to(left.device)

    def of_operands(self, left: Sequence[Quantize], right: Sequence[Quantize]) -> Tensor:
        """The mean over images of correlation - gamma * ranking loss: float64 (candidates,).

        If the candidates do not change the map, the loss is the same for all of them and is left out.

        Arguments:
            left, right: quantizers of the operands: the candidates of one, and the fixed quantizer of the other.

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
        sums = flat.sum(1, dtype=torch.float64), flat.square().sum(1, dtype=torch.float64)
        on_the_left = len(left) > 1
        if on_the_left:  # transpose the product, so that the right factor is the searched one
            fixed, free, quantizers = right[0](z).mT, x.mT.contiguous(), left
        else:
            fixed, free, quantizers = left[0](x), z.contiguous(), right
        factor = FixedFactor(fixed, y.mT if on_the_left else y)
        order = torch.sign(self._differences(x.mT, z.mT)) if self._changes_the_map(on_the_left) else None
        found = []
        for quantize in quantizers:
            candidate = quantize(free)
            score = Moments(flat.shape[1], *sums, *factor.sums(candidate)).correlation()
            if order is not None:
                of_map = (candidate, fixed) if on_the_left else (fixed.mT, candidate.mT)
                loss = ranking_loss(self._differences(*of_map), order, self.ranking.theta)
                score = score - self.ranking.gamma * loss
            found.append(score.sum())
        return torch.stack(found)

    def _changes_the_map(self, on_the_left: bool) -> bool:
        """Whether candidates change the map, and the ranking loss has a weight."""
        return self.ranking.gamma > 0 and self._pairs.numel() > 0 and (self.factor is not None or on_the_left)

    def _differences(self, left: Tensor, right: Tensor) -> Tensor:
        """The differences between columns of the map, (..., pairs, rows), from the transposed operands."""
        if self.factor is None:
            return differences(left, self._pairs)
        return (differences(right, self._pairs) * self.factor) @ left

"""Pearson correlation of a layer's quantized output with its float output, for many candidate quantizers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Quantize = Callable[[Tensor], Tensor]

IN_CACHE = 1 << 17  # elements that are processed at once, so that they stay in the cache
CANDIDATES_AT_ONCE = 16  # of a weight; the matrices computed from them are all in memory


@dataclass(frozen=True)
class Moments:
    """The sums from which a correlation is computed, over all elements of an output: float64, of one shape.

    Arguments:
        count: the number of elements.
        total, square: the sums of y and of y**2 for the float output y.
        total_hat, square_hat: the same for the quantized output.
        cross: the sum of the products of float and quantized output.
    """

    count: int
    total: Tensor
    square: Tensor
    total_hat: Tensor
    square_hat: Tensor
    cross: Tensor

    def correlation(self) -> Tensor:
        """Pearson's coefficient; 0 where an output is constant and the coefficient undefined.

        Source: VT-PTQ, Liu et al. 2021, equation of Gamma.
        """
        covariance = self.cross - self.total * self.total_hat / self.count
        variance = self.square - self.total.square() / self.count
        variance_hat = self.square_hat - self.total_hat.square() / self.count
        # A variance this small relative to the sum of squares is rounding noise.
        constant = (variance <= 1e-12 * self.square) | (variance_hat <= 1e-12 * self.square_hat)
        found = covariance / torch.where(constant, 1.0, variance * variance_hat).sqrt()
        return torch.where(constant, 0.0, found.clamp(-1.0, 1.0))


def correlation(y: Tensor, y_hat: Tensor) -> Tensor:
    """Pearson's coefficient of each image: float64 (images,), from outputs (images, ...)."""
    y, y_hat = y.flatten(1).double(), y_hat.flatten(1).double()
    sums = (y.sum(1), y.square().sum(1), y_hat.sum(1), y_hat.square().sum(1), (y * y_hat).sum(1))
    return Moments(y.shape[1], *sums).correlation()


class FixedFactor:
    """The fixed factor F of a product F Z and the float product Y, to correlate F Z with Y for many candidates Z.

    The correlation does not need the product itself: its squares sum to <Z, F^T F Z>, and its products with Y to
    <Z, F^T Y>. So a candidate costs D^2 N operations for an F of M rows and D columns and a Z of D rows and N columns,
    or M D N where that is less, and only in the latter case a pass over M N elements.

    Arguments:
        fixed: F, (images, ..., M, D), or (M, D) for all images.
        y: Y, (images, ..., M, N).
    """

    def __init__(self, fixed: Tensor, y: Tensor) -> None:
        self._fixed, self._back = fixed, fixed.mT @ y
        self._gram = fixed.mT @ fixed if fixed.shape[-1] <= fixed.shape[-2] else None
        self._column_sums = fixed.sum(-2, dtype=torch.float64)

    def sums(self, candidate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of F Z, of its squares, and of its products with Y: float64 (images,) each.

        Arguments:
            candidate: Z, (images, ..., D, N), contiguous, since passes over its elements take much of a search's time.
        """
        made = (self._fixed if self._gram is None else self._gram) @ candidate
        total = self._column_sums * candidate.sum(-1)
        squares = (made.square_() if self._gram is None else made.mul_(candidate)).sum(-1)
        crosses = torch.mul(candidate, self._back).sum(-1)
        return tuple(each.flatten(1).sum(1, dtype=torch.float64) for each in (total, squares, crosses))  # type: ignore[return-value]


class LinearOutput:
    """The float output of a linear layer, to be correlated with its outputs for candidate quantizers of its operands.

    A candidate's output is not computed where that can be avoided. With G = X^T X of each image and A = W^T W, the
    squares of X W^T sum to <G, A>, and its products with the float output Y to <Y^T X, W>. So a candidate for W costs
    N K^2 operations plus N K + K^2 per image instead of T N K per image, and one for X at most T K min(K, N) per image
    instead of T N K (T tokens, K inputs, N outputs).

    Arguments:
        x: the layer's float input (images, tokens, inputs).
        weight: as stored, (outputs, ...) of `inputs` elements each.
        bias: (outputs,), or None.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.x, self.weight = x, weight
        self.bias = torch.zeros_like(weight.flatten(1)[:, 0]) if bias is None else bias
        self.y = torch.nn.functional.linear(x, weight.flatten(1), bias)
        flat = self.y.flatten(1)
        self._total = flat.sum(1, dtype=torch.float64)
        self._square = torch.stack([each.double().square().sum() for each in flat])
        self._by_output = self.y.sum(1, dtype=torch.float64)  # (images, outputs)

    def of_weights(self, quantize_input: Quantize, quantizers: Sequence[Quantize], bias: Tensor) -> Tensor:
        """The mean correlation with each candidate quantizer of the weight: float64 (candidates,).

        Arguments:
            quantize_input: the quantizer of the input.
            quantizers: candidates.
            bias: (outputs,), which is added to the quantized output.
        """
        inputs = self.x.shape[-1]
        x = torch.cat([quantize_input(part) for part in self.x.split(self._images(inputs))])
        sums = x.sum(1, dtype=torch.float64)  # (images, inputs)
        gram, cross = (x.mT @ x).flatten(1).double(), (self.y.mT @ x).flatten(1).double()
        rows = torch.stack([torch.ones_like(bias), bias])
        found = []
        for start in range(0, len(quantizers), CANDIDATES_AT_ONCE):
            some = quantizers[start : start + CANDIDATES_AT_ONCE]
            grams, weights = gram.new_empty(len(some), gram.shape[1]), cross.new_empty(len(some), cross.shape[1])
            on_rows = gram.new_empty(len(some), 2, inputs)
            for index, quantize in enumerate(some):
                w = quantize(self.weight).flatten(1)
                grams[index] = (w.mT @ w).flatten()
                weights[index] = w.flatten()
                on_rows[index] = rows @ w
            totals, products = (sums @ each.T for each in on_rows.unbind(1))
            found.append(self._moments(bias, gram @ grams.T, cross @ weights.T, totals, products))
        return torch.cat([moments.correlation().mean(0) for moments in found])

    def of_inputs(self, quantizers: Sequence[Quantize], quantize_weight: Quantize, bias: Tensor) -> Tensor:
        """The mean correlation with each candidate quantizer of the input: float64 (candidates,).

        Arguments:
            quantizers: candidates.
            quantize_weight: the quantizer of the weight.
            bias: (outputs,), which is added to the quantized output.
        """
        images, _, inputs = self.x.shape
        weight = quantize_weight(self.weight).flatten(1)
        shape = (images, len(quantizers))
        totals, squares, crosses, products = (self._total.new_zeros(shape) for _ in range(4))
        on_bias = (bias @ weight).double()
        width = self._images(inputs)
        for start in range(0, images, width):
            part = slice(start, start + width)
            x, factor = self.x[part].mT.contiguous(), FixedFactor(weight, self.y[part].mT)
            for index, quantize in enumerate(quantizers):
                xq = quantize(x)
                totals[part, index], squares[part, index], crosses[part, index] = factor.sums(xq)
                products[part, index] = xq.sum(-1).double() @ on_bias
        return self._moments(bias, squares, crosses, totals, products).correlation().mean(0)

    def corrected_bias(self, quantize_input: Quantize, quantize_weight: Quantize) -> Tensor:
        """The bias with which each output unit of the quantized layer has the same mean as in float: (outputs,).

        Source: VT-PTQ, section "Bias Correction".
        """
        images, tokens, inputs = self.x.shape
        parts = self.x.split(self._images(inputs))
        sums = torch.stack([quantize_input(part).sum((0, 1), dtype=torch.float64) for part in parts]).sum(0)
        mean = (sums / (images * tokens)) @ quantize_weight(self.weight).flatten(1).double().T
        return (self._by_output.sum(0) / (images * tokens) - mean).to(self.bias.dtype)

    def _moments(self, bias: Tensor, squares: Tensor, crosses: Tensor, totals: Tensor, products: Tensor) -> Moments:
        """The moments of X W^T + bias, from the sums of X W^T, its squares, and its products with Y and the bias."""
        tokens, bias = self.x.shape[1], bias.double()
        return Moments(
            count=self.y[0].numel(),
            total=self._total[:, None],
            square=self._square[:, None],
            total_hat=totals + tokens * bias.sum(),
            square_hat=squares + 2 * products + tokens * bias.square().sum(),
            cross=crosses + (self._by_output @ bias)[:, None],
        )

    def _images(self, inputs: int) -> int:
        """The number of images that are processed at once."""
        return max(1, IN_CACHE // (self.x.shape[1] * inputs))

"""RMSNorm of integers: LayerNorm's arithmetic without the mean."""

from __future__ import annotations

from torch import Tensor

from vitquant.integer.layer_norm import Norm, divided_by_root


def normalize(x: Tensor, epsilon: int, largest: int) -> Tensor:
    """x / sqrt(mean of squares + epsilon) over the last axis, times 2**16.

    Arguments:
        x: int64 (..., channels).
        epsilon: from `layer_norm.integer_epsilon`.
        largest: a bound on |x|; channels * largest must stay below 2**30.

    Returns:
        int64, at most sqrt(channels) * 2**16 in absolute value, with the error of `layer_norm.normalize`.
    """
    channels = x.shape[-1]
    return divided_by_root(channels * x, channels * (x * x).sum(-1, keepdim=True), epsilon, channels, largest)


class RmsNorm(Norm):
    """The constants of an integer RMSNorm.

    Source: Zhang and Sennrich 2019, equation 4.
    """

    def apply(self, x: Tensor) -> Tensor:
        """The codes of the normalized x, an int64 tensor (..., channels) on one scale."""
        return self.affine.apply(normalize(x, self.epsilon, self.largest), self.low, self.high)

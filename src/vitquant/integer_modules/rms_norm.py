"""RMSNorm on codes."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from vitquant.integer.rms_norm import RmsNorm
from vitquant.integer_modules.layer_norm import IntegerLayerNorm


class IntegerRmsNorm(IntegerLayerNorm):
    """RMSNorm with an integer sum and square root, for the same codes as `IntegerLayerNorm`.

    Source: Zhang and Sennrich 2019, equation 4; the integers are those of `IntegerLayerNorm` without the mean.
    """

    kind = "rms_norm"
    form = RmsNorm

    def reference(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], parameters[0], self.epsilon)

"""LayerNorm on codes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from vitquant.integer import layer_norm as integer
from vitquant.integer.arithmetic import Rescaling, rescaling
from vitquant.integer.rms_norm import RmsNorm
from vitquant.integer_modules.operation import IntegerOperation, NotIntegerError
from vitquant.quantizers import Quantizer
from vitquant.quantizers.uniform import UniformQuantizer
from vitquant.spec import PerAxis, PerTensor, PowerOfTwoFactor


class _LayerNorm(IntegerOperation):
    """The base class of both forms.

    Arguments:
        source, result: see `IntegerOperation`.
        epsilon: of the float LayerNorm.
    """

    kind = "layer_norm"

    def __init__(self, source: Quantizer, result: Quantizer, epsilon: float) -> None:
        super().__init__(source, result)
        self.epsilon = epsilon

    def check(self, source: Quantizer, result: Quantizer) -> None:
        for quantizer, which in ((source, "input"), (result, "result")):
            granularity, factors = quantizer.spec.granularity, isinstance(quantizer.spec.scheme, PowerOfTwoFactor)
            along_channels = isinstance(granularity, PerAxis) and granularity.axis == -1
            if not isinstance(quantizer, UniformQuantizer):
                raise NotIntegerError(f"its {which} is not on equally spaced levels")
            if not (isinstance(granularity, PerTensor) or (along_channels and (factors or which == "result"))):
                raise NotIntegerError(f"its {which} has a scale for each channel that are no powers of two apart")

    def reference(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        weight, bias = parameters
        return functional.layer_norm(x, x.shape[-1:], weight, bias, self.epsilon)

    def integers(self, x: Tensor) -> Tensor:
        """The input as multiples of the source's finest step: int64."""
        source = self.source
        assert source.zero_point is not None
        levels = source.encode(x).to(torch.int64) - source.zero_point
        return levels if source.factor is None else levels << source.factor.to(torch.int64)

    def affine(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gain and bias, float64; 1 and 0 where the LayerNorm has none."""
        one = torch.ones((), dtype=torch.float64, device=self.source.scale.device)
        return one if weight is None else weight.double(), 0 * one if bias is None else bias.double()


class IntegerLayerNorm(_LayerNorm):
    """LayerNorm with integer sums and square root.

    Source: FQ-ViT, Lin et al. 2022, section "Power-of-Two Factor", equation of the integer LayerNorm; inputs of 16
    bits, I-ViT, Li and Gu 2023.
    """

    description = "integer sums and square root"
    widest_input = widest_result = 16
    form: type[integer.LayerNorm] | type[RmsNorm] = integer.LayerNorm
    multiplier: Tensor
    addend: Tensor
    shift: int
    integer_epsilon: int
    largest: int

    def derive(self, width: int, *parameters: Tensor | None) -> Mapping[str, Tensor | int]:
        made = self.definition(width, *parameters)
        affine = {"multiplier": made.affine.multiplier, "addend": made.affine.addend, "shift": made.affine.shift}
        return {**affine, "integer_epsilon": made.epsilon, "largest": made.largest}

    def _codes(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        affine, spec = Rescaling(self.multiplier, self.addend, self.shift), self.result.spec
        held = self.form(self.integer_epsilon, self.largest, affine, spec.qmin, spec.qmax)
        return held.apply(self.integers(x))

    def definition(self, channels: int, weight: Tensor | None, bias: Tensor | None = None) -> integer.Norm:
        """The constants of this norm for a number of channels, gain and bias."""
        source, result = self.source, self.result
        assert result.zero_point is not None
        gain, offset = self.affine(weight, bias)
        step = result.step.double()
        ratio = (gain / step / 2**integer.NORMALIZED_BITS).broadcast_to(channels)
        offset = (offset / step + result.zero_point).broadcast_to(channels)
        shifts = 0 if source.factor is None else int(source.factor.max())
        return self.form(
            epsilon=integer.integer_epsilon(self.epsilon, source.scale.item(), channels),
            largest=(source.spec.qmax - source.spec.qmin) << shifts,
            affine=rescaling(ratio, offset),
            low=result.spec.qmin,
            high=result.spec.qmax,
        )


class PublishedLayerNorm(_LayerNorm):
    """LayerNorm as FQ-ViT's code computes it, for inputs with power-of-two factors only.

    Pitfall: its statistics are float; see `integer.layer_norm.published_layer_norm`.
    """

    description = "integers with float statistics, as published"

    def check(self, source: Quantizer, result: Quantizer) -> None:
        super().check(source, result)
        if not isinstance(source.spec.scheme, PowerOfTwoFactor):
            raise NotIntegerError("the published code keeps LayerNorm in float where there are no power-of-two factors")

    def _codes(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        result = self.result
        assert result.zero_point is not None
        gain, bias = self.affine(*parameters)
        scale, output_scale = self.source.scale.double(), result.step.double()
        steps = integer.published_layer_norm(self.integers(x), gain, bias, scale, output_scale)
        return (steps + result.zero_point).clamp(result.spec.qmin, result.spec.qmax)

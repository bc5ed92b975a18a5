"""One step per channel, a power of two times a common step: the scheme `PowerOfTwoFactor`."""

from __future__ import annotations

from torch import Tensor

from vitquant.quantizers.uniform import UniformQuantizer


class PowerOfTwoFactorQuantizer(UniformQuantizer):
    """`UniformQuantizer` whose step in channel c is `scale * 2**factor[c]`; scale and zero_point are shared.

    `(codes - zero_point) << factor` are integers on one common scale, which is what an integer LayerNorm
    needs. Inside `range()`, which is one per channel, the error is at most half a step of the channel.

    Arguments:
        spec: its granularity is `PerAxis`, the axis of the factors.
        params: scale (), the finest step; zero_point (); factor (channels,).

    Source: FQ-ViT, Lin et al. 2022, section "Power-of-Two Factor".

    Pitfall: the zero point belongs to the coarsest step, so a channel with a finer one covers a
    proportionally smaller range on both sides of zero.
    """

    @property
    def step(self) -> Tensor:
        """The step of each channel, the distance between neighbouring levels: float32 (channels,)."""
        assert self.factor is not None
        return self.scale * 2**self.factor  # integer power: exact

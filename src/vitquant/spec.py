"""The spec of a quantizer as frozen data: bits, sign, symmetry, granularity, scheme; and its parameters.

This module computes nothing: `quantizers` implement the arithmetic of a spec and its parameters, and `observers`
estimate parameters from tensors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from vitquant.errors import RecipeError

MIN_BITS = 2
MAX_BITS = 16


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole operand."""


@dataclass(frozen=True)
class PerAxis:
    """One scale per index of `axis`, an axis of the operand as the operation reads it."""

    axis: int


@dataclass(frozen=True)
class PerHead:
    """One scale per attention head: axis -3 of query, key, probabilities and value."""


Granularity = PerTensor | PerAxis | PerHead


@dataclass(frozen=True)
class Uniform:
    """Equally spaced levels: `(code - zero_point) * scale`.

    Both orders give the same values; their gradients differ within half a step of the range's ends:
    clamp-then-round (LSQ, Q-ViT) with `clamp_before_round`, round-then-clamp (Evol-Q) without.
    """

    clamp_before_round: bool = False


@dataclass(frozen=True)
class PowerOfTwoScale:
    """`Uniform` whose scale is a power of two, so that requantization is a shift."""


@dataclass(frozen=True)
class PowerOfTwoFactor:
    """`Uniform` whose step in channel c is `scale * 2**factor[c]`, factor[c] in 0..factors-1.

    FQ-ViT, section "Power-of-Two Factor". The axis of `factor` is the granularity's.
    """

    factors: int = 4


@dataclass(frozen=True)
class Log2:
    """Powers of two, `scale * 2**-code`, for values in [0, scale]; the largest code is zero.

    Arguments:
        separate_zero: whether zero has an extra code after 2**bits powers, as in FQ-ViT's code: 2**bits + 1 levels,
            which do not fit into `bits` bits.
    """

    separate_zero: bool = False


@dataclass(frozen=True)
class LogSqrt2:
    """Powers of the square root of two, `scale * 2**(-code / 2)`, in [0, scale]; the largest code is zero.

    The log-sqrt2 quantizer of RepQ-ViT.

    Arguments:
        separate_zero: whether zero has an extra code after 2**bits powers, as in RepQ-ViT's code: 2**bits + 1 levels,
            which do not fit into `bits` bits.
    """

    separate_zero: bool = False


@dataclass(frozen=True)
class TwinUniform:
    """Half of the codes are `scale` apart, around zero, and the others, on both sides, `scale * 2**shift` apart.

    Related: the twin uniform quantization of PTQ4ViT, and piecewise linear quantization.
    """

    shift: int = 2


Logarithmic = Log2 | LogSqrt2
Scheme = Uniform | PowerOfTwoScale | PowerOfTwoFactor | TwinUniform | Logarithmic


@dataclass(frozen=True)
class QuantSpec:
    """How one operand is quantized.

    Arguments:
        bits: width of a code, 2 to 16.
        signed: codes run from -2**(bits-1) to 2**(bits-1)-1, else from 0 to 2**bits-1.
        symmetric: the zero point is fixed, at 0 for signed codes and at the middle for unsigned ones.
        granularity: which elements share a scale.
        scheme: how the levels are spaced.

    Raises:
        RecipeError: the combination is not valid.
    """

    bits: int
    signed: bool = False
    symmetric: bool = False
    granularity: Granularity = field(default_factory=PerTensor)
    scheme: Scheme = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise RecipeError(f"bits = {self.bits}: a quantizer takes {MIN_BITS} to {MAX_BITS} bits")
        match self.scheme:
            case Log2() | LogSqrt2() if self.signed or self.bits > 8:
                name = _snake_case(self.scheme)
                raise RecipeError(f"{name} codes are unsigned and have at most 8 bits: set signed = false, bits <= 8")
            case PowerOfTwoFactor(factors) if not 1 <= factors <= 8:
                raise RecipeError(f"factors = {factors}: a power-of-two factor chooses among 1 to 8 shifts")
            case PowerOfTwoFactor() if not isinstance(self.granularity, PerAxis):
                raise RecipeError('power_of_two_factor needs per = "axis": it has one factor per channel')
            case PowerOfTwoFactor() if self.signed or self.symmetric:
                raise RecipeError("power_of_two_factor codes are unsigned and asymmetric, as published")
            case TwinUniform(shift) if not 1 <= shift <= 8:
                raise RecipeError(f"shift = {shift}: a coarse step of twin_uniform is 2**1 to 2**8 fine ones")
            case TwinUniform() if self.signed or self.symmetric or self.bits > 8:
                raise RecipeError("twin_uniform codes are unsigned and asymmetric, and have at most 8 bits")
            case _:
                pass

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for reports and saved models: `{"scheme": "uniform", "bits": 8, ...}`."""
        return {
            "scheme": _snake_case(self.scheme),
            "bits": self.bits,
            "signed": self.signed,
            "symmetric": self.symmetric,
            "per": _snake_case(self.granularity).removeprefix("per_"),
            **asdict(self.granularity),
            **asdict(self.scheme),
        }


def _snake_case(value: object) -> str:
    words = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in type(value).__name__)
    return words.removeprefix("_")


@dataclass(frozen=True)
class QParams:
    """The parameters of a quantizer with a given spec, on one device.

    Arguments:
        scale: float32, positive; shape () for one scale, (n,) along the granularity's axis.
        zero_point: int32 of scale's shape, the code of the real number 0; None for logarithmic schemes.
        factor: int32 (channels,), the power-of-two factors; None for every other scheme.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    factor: torch.Tensor | None = None

"""The parameters of a quantizer that covers a range of values, as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from vitquant.spec import Log2, LogSqrt2, PowerOfTwoFactor, PowerOfTwoScale, QParams, QuantSpec, TwinUniform, Uniform

SMALLEST_SCALE = torch.finfo(torch.float32).eps


def params_from_range(low: Tensor, high: Tensor, spec: QuantSpec) -> QParams:
    """The parameters with which `spec` covers [low, high] and zero.

    Arguments:
        low, high: smallest and largest value, finite, of any floating dtype; () or (n,) along the
            granularity's axis; always (channels,) for `PowerOfTwoFactor`.
        spec: of the quantizer.

    Returns:
        Scales of at least float32's eps (1.2e-7), so that a channel of zeros is harmless. Symmetric:
        scale = max(|low|, |high|) / ((qmax - qmin) / 2), zero_point 0 or, unsigned, 2**(bits-1).
        Asymmetric: scale = (high - low) / (qmax - qmin), zero_point = clamp(qmin - round(low / scale)).

    Twin: the levels span high - low, and zero gets the code with which their ends come nearest to low and high.

    Source: FQ-ViT's code (`observer/minmax.py`); the factors, its section "Power-of-Two Factor".

    Pitfall: neither form ends exactly at the range. Symmetric codes stop half a step short of the
    largest positive value (127 * scale for a maximum of 127.5 * scale), asymmetric ones up to half a
    step short on the side towards which the zero point was rounded. No value is further off than that.
    """
    low, high = low.double().clamp(max=0.0), high.double().clamp(min=0.0)
    match spec.scheme:
        case Log2() | LogSqrt2():
            return QParams(_floored(high))
        case PowerOfTwoFactor(factors):
            return _covering_factors(low, high, spec, factors)
        case TwinUniform(shift):
            return _covering_twin(low, high, spec, shift)
        case Uniform() | PowerOfTwoScale():
            pass
    if spec.symmetric:
        scale = _floored(torch.maximum(-low, high) / ((spec.qmax - spec.qmin) / 2))
    else:
        scale = _floored((high - low) / (spec.qmax - spec.qmin))
    if isinstance(spec.scheme, PowerOfTwoScale):
        scale = _up_to_power_of_two(scale)
    return QParams(scale, _zero_point(low, scale, spec))


def params_from_free_range(low: Tensor, high: Tensor, spec: QuantSpec) -> QParams:
    """The parameters with which an asymmetric uniform `spec` covers [low, high], which need not hold zero.

    Arguments:
        low, high: as for `params_from_range`.
        spec: `Uniform`, not symmetric; for any other the result is that of `params_from_range`.

    Returns:
        scale = (high - low) / (qmax - qmin), zero_point = qmin - round(low / scale). The zero point may lie outside of
        the codes; |low / scale|, which is large where a channel hardly varies, is limited to 2**24.

    Source: RepQ-ViT's code, channel by channel.
    """
    if spec.symmetric or not isinstance(spec.scheme, Uniform):
        return params_from_range(low, high, spec)
    scale = _floored((high.double() - low.double()) / (spec.qmax - spec.qmin))
    offset = torch.round(low.double() / scale.double()).clamp(-(2.0**24), 2.0**24)
    return QParams(scale, (spec.qmin - offset).to(torch.int32))


def _floored(scale: Tensor) -> Tensor:
    return scale.to(torch.float32).clamp(min=SMALLEST_SCALE)


def _up_to_power_of_two(scale: Tensor) -> Tensor:
    mantissa = torch.frexp(scale).mantissa  # 1/2 for a power of two, else between 1/2 and 1
    power = scale / mantissa  # exact
    return torch.where(mantissa == 0.5, power / 2, power)


def _zero_point(low: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    if spec.symmetric:
        return torch.full_like(scale, 0 if spec.signed else 1 << (spec.bits - 1), dtype=torch.int32)
    return (spec.qmin - torch.round(low / scale.double())).clamp(spec.qmin, spec.qmax).to(torch.int32)


def _covering_factors(low: Tensor, high: Tensor, spec: QuantSpec, factors: int) -> QParams:
    """The smallest factor per channel that saturates none of its values, given the zero point of the coarsest step.

    FQ-ViT chooses among the same factors by mean squared error on a calibration batch instead; the method
    `choose-factors` does so, since it needs the data.
    """
    coarsest = _floored((high.max() - low.min()) / (spec.qmax - spec.qmin))
    zero_point = _zero_point(low.min(), coarsest, spec)
    scale = coarsest / 2 ** (factors - 1)
    steps = scale.double() * 2 ** torch.arange(factors, device=scale.device)[:, None]
    covered = (torch.round(high / steps) + zero_point <= spec.qmax) & (
        torch.round(low / steps) + zero_point >= spec.qmin
    )
    covered[-1] = True  # nothing is coarser, even if it saturates
    return QParams(scale, zero_point, covered.int().argmax(0).to(torch.int32))


def _covering_twin(low: Tensor, high: Tensor, spec: QuantSpec, shift: int) -> QParams:
    """The fine step with which the levels span the range, and the zero point with which they lie on the range."""
    fine = 1 << (spec.bits - 1)
    scale = _floored((high - low) / (fine - 1 + (fine << shift)))
    below = -low / scale.double()  # in fine steps; from zero down: fine / 2 fine levels, then up to `fine` coarse ones
    coarse = ((below - fine // 2) / (1 << shift)).clamp(0, fine)
    zero_point = torch.round(below.clamp(max=fine // 2) + coarse + (below - fine // 2 - (fine << shift)).clamp(min=0))
    return QParams(scale, zero_point.clamp(0, spec.qmax).to(torch.int32))

"""Quantizers: the arithmetic of a spec and its parameters, one file for each kind of scheme."""

from __future__ import annotations

from vitquant.quantizers.logarithmic import Log2Quantizer, LogSqrt2Quantizer
from vitquant.quantizers.parameters import params_from_range
from vitquant.quantizers.power_of_two_factor import PowerOfTwoFactorQuantizer
from vitquant.quantizers.quantizer import Quantizer
from vitquant.quantizers.twin_uniform import TwinUniformQuantizer
from vitquant.quantizers.uniform import UniformQuantizer
from vitquant.spec import Log2, LogSqrt2, PowerOfTwoFactor, PowerOfTwoScale, QParams, QuantSpec, TwinUniform, Uniform

__all__ = ["Quantizer", "build_quantizer", "params_from_range"]


def build_quantizer(spec: QuantSpec, params: QParams) -> Quantizer:
    """The quantizer that a spec and its parameters describe."""
    match spec.scheme:
        case Uniform() | PowerOfTwoScale():
            return UniformQuantizer(spec, params)
        case PowerOfTwoFactor():
            return PowerOfTwoFactorQuantizer(spec, params)
        case TwinUniform():
            return TwinUniformQuantizer(spec, params)
        case Log2():
            return Log2Quantizer(spec, params)
        case LogSqrt2():
            return LogSqrt2Quantizer(spec, params)

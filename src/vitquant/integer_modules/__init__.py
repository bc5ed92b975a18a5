"""Modules that compute an operation on codes, between two quantizers, by the definitions in `integer`."""

from vitquant.integer_modules.activation import TableActivation
from vitquant.integer_modules.arithmetic import Arithmetic
from vitquant.integer_modules.layer_norm import IntegerLayerNorm, PublishedLayerNorm
from vitquant.integer_modules.operation import IntegerOperation, NotIntegerError
from vitquant.integer_modules.rms_norm import IntegerRmsNorm
from vitquant.integer_modules.softmax import IntegerSoftmax, LogIntSoftmax, PublishedLogIntSoftmax

__all__ = [
    "Arithmetic",
    "IntegerLayerNorm",
    "IntegerOperation",
    "IntegerRmsNorm",
    "IntegerSoftmax",
    "LogIntSoftmax",
    "NotIntegerError",
    "PublishedLayerNorm",
    "PublishedLogIntSoftmax",
    "TableActivation",
]

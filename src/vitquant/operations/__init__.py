"""Operations computed on codes: between two quantizers, by the definitions in `integer`."""

from vitquant.operations.activation import TableActivation
from vitquant.operations.arithmetic import Arithmetic
from vitquant.operations.layer_norm import IntegerLayerNorm, PublishedLayerNorm
from vitquant.operations.operation import IntegerOperation, NotIntegerError
from vitquant.operations.softmax import IntegerSoftmax, LogIntSoftmax, PublishedLogIntSoftmax

__all__ = [
    "Arithmetic",
    "IntegerLayerNorm",
    "IntegerOperation",
    "IntegerSoftmax",
    "LogIntSoftmax",
    "NotIntegerError",
    "PublishedLayerNorm",
    "PublishedLogIntSoftmax",
    "TableActivation",
]

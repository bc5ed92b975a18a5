"""The norms and softmaxes of `integer` as ONNX graphs, translated line by line."""

from __future__ import annotations

import numpy as np

from vitquant.exports.onnx_integer.arithmetic import logarithm, shift_down, shift_right, square_root
from vitquant.exports.onnx_integer.builder import Value
from vitquant.integer.exponential import OCTAVE_BITS, VALUE_BITS
from vitquant.integer.layer_norm import NORMALIZED_BITS, RECIPROCAL_BITS, guard_bits
from vitquant.integer.softmax import ROW_BITS, step_bits

_LOWEST = -(1 << 31)  # in a fully masked row differences from it wrap around, but all are replaced


def normalize(x: Value, channels: int, epsilon: int, largest: int) -> Value:
    """`integer.layer_norm.normalize` of int64 (..., channels)."""
    total = x.sum()
    spread = (x * x).sum() * channels - total * total
    return _divided_by_root(x * channels - total, spread, epsilon, channels, largest)


def normalize_by_squares(x: Value, channels: int, epsilon: int, largest: int) -> Value:
    """`integer.rms_norm.normalize` of int64 (..., channels)."""
    return _divided_by_root(x * channels, (x * x).sum() * channels, epsilon, channels, largest)


def _divided_by_root(x: Value, squares: Value, epsilon: int, channels: int, largest: int) -> Value:
    """`integer.layer_norm.divided_by_root`."""
    guard = guard_bits(channels, largest, epsilon)
    root = square_root((squares + epsilon) * (1 << (2 * guard)))
    reciprocal = x.graph.scalar(1 << (RECIPROCAL_BITS + guard), x.dtype) // root
    return shift_right(x * reciprocal, RECIPROCAL_BITS - NORMALIZED_BITS)


def distances(codes: Value, mask: Value | None, last: int) -> Value:
    """`integer.softmax.distances`: int32, indices into tables.

    Arguments:
        codes: int32 (..., row).
        mask: bool, broadcastable to codes.
        last: the index of masked entries, the last one of the tables.
    """
    if mask is None:
        return codes.largest() - codes
    return mask.where(last, mask.where(_LOWEST, codes).largest() - codes)


def softmax_to_powers(
    distance: Value, values: Value, octaves: Value, zero: int, steps: int = 1, offset: int = 0
) -> Value:
    """`integer.softmax.log_int_softmax`: uint32 codes.

    Arguments:
        distance: int32, from `distances`.
        values, octaves: int32 tables of the exponential.
        zero: the code of zero.
        steps: the number of powers in an octave, 1 or 2.
        offset: log2 of the largest power, in units of `Exponential.octaves`.
    """
    digits = step_bits(steps)
    total = logarithm(_row_sums(values.entries(distance)), OCTAVE_BITS) - (VALUE_BITS << OCTAVE_BITS)
    rounded_up = (total + (offset + (1 << (digits - 1)))).cast(np.int32)
    found = octaves.entries(distance) + rounded_up
    if offset < 0:  # the largest scores of a row may lie above the first power
        found = found.maximum(0)
    return (found.cast(np.uint32) >> digits).minimum(zero)


def published_softmax_to_powers(distance: Value, values: Value, zero: int) -> Value:
    """`integer.softmax.published_log_int_softmax`: int64 codes.

    The code, the logarithm of the inverse rounded up from 1.5 * 2**k on, is the number of thresholds 1.5, 3, 6 .. that
    are at most the inverse.
    """
    value = values.entries(distance)
    doubled = (value * 2).maximum(1).cast(np.int64)
    inverse = (_row_sums(value) * 2 + value.cast(np.int64)) // doubled
    thresholds = value.graph.constant([3 << k for k in range(zero)], np.int64)
    column = value.graph.node("Unsqueeze", inverse * 2, value.graph.shape((-1,)))
    return column.at_least(thresholds).cast(np.int64).sum(keep=False)


def softmax_to_levels(distance: Value, values: Value, multiplier: int, shift: int) -> Value:
    """`integer.softmax.integer_softmax`: int32, without zero point and clamp."""
    value, digits = values.entries(distance), shift + ROW_BITS
    reciprocal = value.graph.scalar(multiplier << ROW_BITS, np.dtype(np.int64)) // _row_sums(value)
    return shift_down(value.cast(np.int64) * reciprocal + (1 << (digits - 1)), digits).cast(np.int32)


def _row_sums(values: Value) -> Value:
    """`integer.softmax.row_sums` of int32 exponentials: int64 (..., 1)."""
    return values.sum().maximum(1 << VALUE_BITS).cast(np.int64)

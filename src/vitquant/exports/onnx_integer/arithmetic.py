"""Square root, logarithm and shifts of `integer.arithmetic` as ONNX graphs; values are int64 unless said otherwise."""

from __future__ import annotations

import numpy as np

from vitquant.exports.onnx_integer.builder import Value

_LIMITS = np.iinfo(np.int64)


def shift_down(x: Value, digits: int) -> Value:
    """x >> digits for x >= 0."""
    return (x.cast(np.uint64) >> digits).cast(np.int64)


def shift_floor(x: Value, digits: int) -> Value:
    """x >> digits for any x, negative ones rounded down; 1 <= digits <= 63.

    With its sign bit flipped, x read as unsigned is x + 2**63 for any x.
    """
    turned = x.graph.node("BitwiseXor", x, x.graph.scalar(_LIMITS.min, x.dtype))
    return shift_down(turned, digits) - (1 << (63 - digits))


def shift_right(x: Value, digits: int) -> Value:
    """x / 2**digits rounded to nearest, halves up; digits >= 1."""
    return shift_floor(x + (1 << (digits - 1)), digits)


def shift_clamped(x: Value, digits: int, low: int, high: int) -> Value:
    """clamp(x >> digits, low, high) for any x; low and high within 32 bits."""
    shifted = shift_floor(x, digits)
    if digits >= 32:
        return shifted.cast(np.int32).clip(low, high)
    shifted = shifted.at_least(high).where(high, shifted)
    return shifted.at_least(low).where(shifted, low)


def bit_length(x: Value) -> Value:
    """The number of binary digits of x >= 0, counted as the number of powers of two that are at most x.

    Arguments:
        x: (..., 1); it is compared with all 63 powers by broadcasting, so it should be small.
    """
    powers = x.graph.constant([1 << k for k in range(63)], np.int64)
    return x.at_least(powers).cast(np.int64).sum()


def square_root(x: Value) -> Value:
    """floor(sqrt(x)) for 1 <= x < 2**62, of shape (..., 1).

    The steps are those of `integer.arithmetic.square_root`. Without its minimum they end at the floor or one above it,
    which is corrected.
    """
    starts = x.graph.constant([1 << ((length + 1) >> 1) for length in range(63)], np.int64)
    root = starts.entries(bit_length(x))
    for _ in range(7):
        root = (root + x // root) // 2
    return root - 1 + x.at_least(root * root).cast(np.int64)


def logarithm(x: Value, fraction_bits: int) -> Value:
    """log2(x) * 2**fraction_bits for 1 <= x < 2**31, of shape (..., 1), rounded like `integer.arithmetic.logarithm`."""
    length = bit_length(x)
    up = x.graph.constant([0, *(1 << (31 - n) for n in range(1, 32))], np.int64)
    mantissa, whole = x * up.entries(length), length - 1
    for _ in range(fraction_bits):
        mantissa = (mantissa * mantissa) // (1 << 30)
        digit = mantissa // (1 << 31)
        mantissa = mantissa // (digit + 1)  # 1 << digit
        whole = whole * 2 + digit
    return whole

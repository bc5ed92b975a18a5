"""Matrix products and convolutions of integers as products of unsigned bytes, which every runtime computes exactly.

ONNX Runtime saturates u8 x s8 on processors without VNNI, and is slow at s8 x s8. So signed codes and their zero
points are shifted to unsigned ones, and codes of more than 8 bits are split into bytes. Sums are s32, and partial sums
may wrap around; the program's ranges prove that the final sums fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vitquant.errors import ExportError
from vitquant.exports.onnx_integer.builder import Graph, Value
from vitquant.program.instructions import TYPES


@dataclass(frozen=True)
class Bytes:
    """One byte of every element, the tensor weight * (codes - zero).

    Arguments:
        codes: uint8.
        zero: uint8, one for all or one per column.
        weight: 1, or 256 for the high byte.
    """

    codes: Value
    zero: Value
    weight: int


def bytes_of(graph: Graph, codes: Value | Tensor, type: str, zero: int | Tensor) -> list[Bytes]:
    """Codes minus their zero point as a sum of `Bytes`.

    Arguments:
        codes: of a register, or a constant; constants of 4 bits are stored in 4 bits.
        type: of the register.
        zero: the zero point, or for a constant (k, n) one per column.

    Raises:
        ExportError: the codes have more than 16 bits.
    """
    bits, signed = TYPES[type]
    if bits > 16:
        raise ExportError(f"{graph.scope}: an operand has {bits} bits, products have at most 16; quantize it")
    up = 1 << (bits - 1) if signed else 0

    def part(codes: Value, zero: int | Tensor, weight: int) -> Bytes:
        return Bytes(codes, graph.constant(np.asarray(zero), np.uint8), weight)

    if isinstance(codes, Tensor):
        if bits <= 8:
            stored = graph.nibbles(codes + up) if bits == 4 else graph.constant(codes + up, np.uint8)
            return [part(stored, zero + up, 1)]
        codes = graph.constant(codes, np.int32)
    if bits <= 8:
        shifted = (codes.cast(np.int32) + up).cast(np.uint8) if signed else codes
        return [part(shifted, zero + up, 1)]
    wide = codes + up
    return [
        part((wide.cast(np.uint32) >> 8).cast(np.uint8), (zero + up) >> 8, 256),
        part(wide.cast(np.uint8), (zero + up) & 255, 1),
    ]


def matmul(left: Sequence[Bytes], right: Sequence[Bytes]) -> Value:
    """The matrix product: int32."""
    return _summed(left, right, lambda *operands: operands[0].graph.node("MatMulInteger", *operands, dtype=np.int32))


def convolution(
    images: Sequence[Bytes],
    kernel: Sequence[Bytes],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Value:
    """The two-dimensional convolution, with the images padded by their zero point: int32."""

    def product(*operands: Value) -> Value:
        geometry = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
        return operands[0].graph.node("ConvInteger", *operands, dtype=np.int32, **geometry)

    return _summed(images, kernel, product)


def _summed(left: Sequence[Bytes], right: Sequence[Bytes], product: Callable[..., Value]) -> Value:
    """The weighted sum of the products of all pairs of bytes."""
    total = None
    for a in left:
        for b in right:
            part = product(a.codes, b.codes, a.zero, b.zero)
            weight = a.weight * b.weight
            part = part if weight == 1 else part * weight
            total = part if total is None else total + part
    assert total is not None
    return total

"""Codes of 2 to 16 bits as bytes and back: the storage format of saved weights."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from vitquant.errors import CheckpointError
from vitquant.quantizers.quantizer import code_dtype


def pack(codes: Tensor, bits: int) -> Tensor:
    """Store codes as a little-endian stream of `bits` bits each, or of 16 bits each from 9 bits on.

    Two 4-bit codes share a byte, the first in its low half; 3, 5, 6 and 7 bits cross byte borders.
    Negative codes are stored in two's complement.

    Arguments:
        codes: integers of any shape and integer dtype that fit in `bits`.
        bits: 2 to 16.

    Returns:
        uint8 (packed_size(count, bits),).

    Pitfall: the upper bits of a code that does not fit are dropped silently.
    """
    flat = codes.flatten()
    if bits > 8:
        flat = flat.to(torch.int32)
        return torch.stack((flat & 0xFF, flat >> 8 & 0xFF), dim=-1).to(torch.uint8).flatten()
    groups = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)  # 8 codes fill `bits` bytes
    word = torch.zeros(len(groups), dtype=torch.int64, device=codes.device)
    for i in range(8):
        word |= (groups[:, i].to(torch.int64) & ((1 << bits) - 1)) << (i * bits)
    packed = torch.stack([(word >> (8 * i) & 0xFF).to(torch.uint8) for i in range(bits)], dim=-1)
    return packed.flatten()[: packed_size(len(flat), bits)]


def unpack(packed: Tensor, bits: int, signed: bool, shape: Sequence[int]) -> Tensor:
    """Read back what `pack` stored.

    Arguments:
        packed: uint8 (packed_size(count, bits),).
        bits, signed: as in the spec that the codes belong to.
        shape: of the codes.

    Returns:
        Codes of dtype `code_dtype(bits, signed)`.

    Raises:
        CheckpointError: `packed` has another length than `shape` asks for.
    """
    count = prod(shape)
    expected = packed_size(count, bits)
    if packed.numel() != expected:
        raise CheckpointError(
            f"{bits}-bit codes of shape {tuple(shape)}: expected {expected} bytes, found {packed.numel()}"
        )
    if bits > 8:
        low, high = packed.view(-1, 2).to(torch.int32).unbind(dim=-1)
        codes = low | high << 8
    else:
        groups = torch.nn.functional.pad(packed, (0, -expected % bits)).view(-1, bits)
        word = torch.zeros(len(groups), dtype=torch.int64, device=packed.device)
        for i in range(bits):
            word |= groups[:, i].to(torch.int64) << (8 * i)
        codes = torch.stack([(word >> (i * bits) & ((1 << bits) - 1)).to(torch.int16) for i in range(8)], dim=-1)
        codes = codes.flatten()[:count]
    if signed:
        sign = 1 << (_stored_width(bits) - 1)
        codes = (codes ^ sign) - sign
    return codes.to(code_dtype(bits, signed)).view(tuple(shape))


def packed_size(count: int, bits: int) -> int:
    """How many bytes `count` codes of `bits` bits take."""
    return -(-count * _stored_width(bits) // 8)


def _stored_width(bits: int) -> int:
    return bits if bits <= 8 else 16

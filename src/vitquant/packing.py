"""Packing of integers of 2 to 64 bits into bytes, for weights and constants in files and in running programs."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from vitquant.errors import CheckpointError


def code_dtype(bits: int, signed: bool) -> torch.dtype:
    """The dtype for codes of a number of bits.

    It is uint8 or int8 up to 8 bits, int16 or for unsigned codes int32 up to 16 bits, int32 up to 32 bits, and int64
    above; codes of more than 16 bits are signed.
    """
    if bits <= 8:
        return torch.int8 if signed else torch.uint8
    if bits <= 16:
        return torch.int16 if signed else torch.int32
    return torch.int32 if bits <= 32 else torch.int64


def pack(codes: Tensor, bits: int) -> Tensor:
    """Store codes as a little-endian stream of `bits` bits each; more than 8 bits take 16, 32 or 64.

    Two 4-bit codes share a byte, the first in its low half; codes of 3, 5, 6 and 7 bits cross byte boundaries.
    Negative codes are stored in two's complement.

    Arguments:
        codes: integers of any shape and integer dtype that fit in `bits`.
        bits: 2 to 64.

    Returns:
        uint8 (packed_size(count, bits),).

    Pitfall: the upper bits of a code that does not fit are dropped silently.
    """
    flat = codes.flatten()
    if bits > 8:
        flat = flat.to(torch.int64)
        return torch.stack([flat >> shift & 0xFF for shift in range(0, _stored_width(bits), 8)], -1).byte().flatten()
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
        bits, signed: as when the codes were packed; codes of more than 16 bits are signed.
        shape: of the codes.

    Returns:
        Codes of dtype `code_dtype(bits, signed)`; if they are stored in 8, 32 or 64 bits, they share the memory of
        `packed`.

    Raises:
        CheckpointError: the length of `packed` does not fit `shape`.
    """
    count = prod(shape)
    expected = packed_size(count, bits)
    if packed.numel() != expected:
        raise CheckpointError(
            f"{bits}-bit codes of shape {tuple(shape)}: expected {expected} bytes, found {packed.numel()}"
        )
    dtype, width = code_dtype(bits, signed), _stored_width(bits)
    if width in (8, 32, 64):
        return packed.view(dtype).view(tuple(shape))
    if width == 16:
        low, high = packed.view(-1, 2).to(torch.int32).unbind(dim=-1)
        codes = low | high << 8
    elif width == 4:
        codes = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    else:
        groups = torch.nn.functional.pad(packed, (0, -expected % bits)).view(-1, bits)
        word = torch.zeros(len(groups), dtype=torch.int64, device=packed.device)
        for i in range(bits):
            word |= groups[:, i].to(torch.int64) << (8 * i)
        codes = torch.stack([(word >> (i * bits) & ((1 << bits) - 1)).to(torch.int16) for i in range(8)], dim=-1)
    codes = codes.flatten()[:count]
    if signed:
        sign = 1 << (width - 1)
        codes = (codes ^ sign) - sign  # in uint8 it wraps around to the byte of the negative number
    return codes.to(dtype).view(tuple(shape))


def packed_size(count: int, bits: int) -> int:
    """The number of bytes of `count` packed codes of `bits` bits."""
    return -(-count * _stored_width(bits) // 8)


def _stored_width(bits: int) -> int:
    return bits if bits <= 8 else next(width for width in (16, 32, 64) if bits <= width)

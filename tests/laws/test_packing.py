"""The laws of packed codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitquant.errors import CheckpointError
from vitquant.packing import code_dtype, pack, packed_size, unpack
from vitquant.spec import QuantSpec


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 16), st.booleans(), st.lists(st.integers(0, 7), max_size=3), st.integers(0, 2**31))
def test_codes_come_back(bits: int, signed: bool, shape: list[int], seed: int) -> None:
    spec = QuantSpec(bits, signed)
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(spec.qmin, spec.qmax + 1, shape, generator=random).to(code_dtype(bits, signed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_size(codes.numel(), bits),)
    back = unpack(packed, bits, signed, shape)
    assert back.dtype == codes.dtype
    assert torch.equal(back, codes)


@settings(max_examples=100, deadline=None)
@given(st.integers(17, 64), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
def test_wide_integers_come_back(bits: int, values: list[int]) -> None:
    half = 1 << (bits - 1)
    values = [(value + half) % (2 * half) - half for value in values]
    packed = pack(torch.tensor(values, dtype=torch.int64), bits)
    width = 4 if bits <= 32 else 8
    assert bytes(packed.tolist()) == b"".join(value.to_bytes(width, "little", signed=True) for value in values)
    assert packed_size(len(values), bits) == len(packed)
    assert unpack(packed, bits, True, [len(values)]).tolist() == values


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 8), st.lists(st.integers(0, 255), max_size=40))
def test_the_format_is_one_little_endian_stream_of_bits(bits: int, values: list[int]) -> None:
    values = [value % (1 << bits) for value in values]
    stream = sum(value << (i * bits) for i, value in enumerate(values))
    expected = stream.to_bytes(-(-len(values) * bits // 8), "little")
    assert bytes(pack(torch.tensor(values, dtype=torch.uint8), bits).tolist()) == expected


def test_the_first_of_two_nibbles_is_the_low_one() -> None:
    assert pack(torch.tensor([0x1, 0x2, -1], dtype=torch.int8), 4).tolist() == [0x21, 0x0F]
    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b00111001]
    assert pack(torch.tensor([-2], dtype=torch.int16), 12).tolist() == [0xFE, 0xFF]


def test_unpack_takes_codes_that_are_not_contiguous() -> None:
    codes = torch.arange(12).view(3, 4).t()
    assert torch.equal(unpack(pack(codes, 5), 5, False, (4, 3)).long(), codes)


@pytest.mark.parametrize("found", [0, 4, 6])
def test_a_wrong_length_is_named(found: int) -> None:
    with pytest.raises(CheckpointError, match=rf"expected 5 bytes, found {found}"):
        unpack(torch.zeros(found, dtype=torch.uint8), 4, True, (3, 3))

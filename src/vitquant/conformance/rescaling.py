"""Vectors of requantization: rounding, shifts, clamps, and multipliers of every granularity."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vitquant.conformance.drafting import Draft, Vector, codes_between, noise
from vitquant.program import instructions as p

_HEADS, _ROWS, _CHANNELS = 3, 4, 5
_GRANULARITIES = {
    "tensor": (), "channel": (_CHANNELS,), "row": (_ROWS, 1), "head": (_HEADS, 1, 1),
    "head-and-channel": (_HEADS, 1, _CHANNELS), "row-and-channel": (_ROWS, _CHANNELS),
    "element": (_HEADS, _ROWS, _CHANNELS),
}  # fmt: skip


def rescalings() -> Iterator[Vector]:
    """All vectors of requantization."""
    yield _halves()
    for shift in (1, 31, 32, 33, 62):
        yield _shifted(shift)
    for type in p.TYPES:
        yield _clamped(type)
    for name, shape in _GRANULARITIES.items():
        yield _by(name, shape)
    yield _joined()


def _halves() -> Vector:
    draft = Draft("s8", 256)
    one, half = draft.constant("s32", 1), draft.constant("s64", 2)
    draft.emit(p.Requantize, "s8", inputs=("x",), multipliers=(one,), addend=half, shift=2, low=-128, high=127)
    return draft.vector("requantize-halves", "quarters: halves are rounded up, those of negative numbers too",
                        torch.arange(-128, 128)[None])  # fmt: skip


def _shifted(shift: int) -> Vector:
    """Sums over the whole range of 64 bits, with results at both ends of the codes and between them."""
    draft = Draft("s32", 6)
    multipliers = draft.constant("s32", [2**31 - 1, -(2**31) + 1, 2**30, 1, -1, 0])
    room, step = 2**62 - 1, 1 << (shift - 1)
    addend = draft.constant("s64", [room, -room, step, min(127 * 2 * step, room), -step, -step - 1])
    draft.emit(p.Requantize, "s8", inputs=("x",), multipliers=(multipliers,), addend=addend, shift=shift, low=-100,
               high=120)  # fmt: skip
    ends = torch.tensor([[2**31 - 1] * 6, [-(2**31)] * 6, [0] * 6, [1] * 6, [-1] * 6])
    codes = torch.cat([ends, noise(shift, -(2**31), 2**31 - 1, 3, 6), noise(shift, -500, 500, 3, 6)])
    return draft.vector(f"requantize-shift-{shift}", f"a shift of {shift}, sums up to the ends of 64 bits", codes)


def _clamped(type: str) -> Vector:
    draft = Draft("s32", 5)
    low, high = p.type_limits(type)
    low, high = max(low, -(2**62)), min(high, 2**62)
    draft.emit(
        p.Requantize, type, inputs=("x",), multipliers=(draft.constant("s32", [1, 3, -5, 2**31 - 1, 2**10]),),
        addend=draft.constant("s32", 1), shift=1, low=low, high=high,
    )  # fmt: skip
    codes = torch.cat([codes_between(-(2**31), 2**31 - 1, 5), noise(5, -40, 40, 6, 5)])
    return draft.vector(f"requantize-to-{type}", f"clamped to what {type} holds, within the limits of a number", codes)


def _by(name: str, shape: tuple[int, ...]) -> Vector:
    draft = Draft("s16", _HEADS, _ROWS, _CHANNELS)
    addend = draft.constant("s64", noise(3, -(2**40), 2**40, *shape))
    draft.emit(p.Requantize, "s8", inputs=("x",), multipliers=(draft.noisy("s32", *shape),), addend=addend, shift=39,
               low=-128, high=127)  # fmt: skip
    about = f"a multiplier and an addend per {name.replace('-', ' ')}, of (images, heads, rows, channels)"
    return draft.vector(f"requantize-per-{name}", about)


def _joined() -> Vector:
    draft = Draft("u8", _HEADS, _ROWS, _CHANNELS)
    row = draft.emit(p.Sum, "s32", input="x", axes=(3,), keep=True, input_zero=9)
    multipliers = tuple(draft.noisy("s32", *_GRANULARITIES[name]) for name in ("head", "channel", "row"))
    inputs = ("x", row, draft.noisy("s8", _ROWS, _CHANNELS))
    addend = draft.constant("s64", 2**36)
    draft.emit(p.Requantize, "u8", inputs=inputs, multipliers=multipliers, addend=addend, shift=33, low=3, high=250)
    return draft.vector("requantize-three-inputs", "three inputs, two of them repeated, are added before one rounding")

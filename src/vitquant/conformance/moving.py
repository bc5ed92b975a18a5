"""Vectors of the instructions that move elements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vitquant.conformance.drafting import Draft, Vector
from vitquant.program import instructions as p

# Name: class, type of the input, arguments; the input is (images, 4, 6, 7).
_MOVES: dict[str, tuple[type[p.Instruction], str, dict[str, Any]]] = {
    "reshape": (p.Reshape, "u8", {"shape": (-1, 7, 24)}),
    "reshape-with-known-sizes": (p.Reshape, "s16", {"shape": (-1, 168)}),
    "permute": (p.Permute, "u4", {"axes": (0, 3, 1, 2)}),
    "slice": (p.Slice, "s4", {"axis": 3, "start": 1, "stop": 6, "step": 2}),
    "slice-one": (p.Slice, "u16", {"axis": 1, "start": 3, "stop": 4, "step": 1}),
    "roll": (p.Roll, "s8", {"shifts": (2, -3), "axes": (1, 3)}),
    "roll-around": (p.Roll, "u8", {"shifts": (13,), "axes": (2,)}),
    "pad": (p.Pad, "s8", {"amounts": (1, 2), "value": -3}),
    "pad-three-axes": (p.Pad, "u8", {"amounts": (0, 1, 2, 0, 1, 1), "value": 255}),
}


def moves() -> Iterator[Vector]:
    """All vectors of these instructions."""
    for name, (kind, type, given) in _MOVES.items():
        draft = Draft(type, 4, 6, 7)
        draft.emit(kind, type, input="x", **given)
        yield draft.vector(name, ", ".join(f"{key} {value}" for key, value in given.items()))
    yield _windows()
    yield _wider()
    yield from _joins()


def _windows() -> Vector:
    """Swin's windows: they are moved into the batch axis, multiplied there, and moved back."""
    draft = Draft("s8", 4, 4, 3)
    apart = draft.emit(p.Reshape, "s8", input="x", shape=(-1, 2, 2, 2, 2, 3))
    turned = draft.emit(p.Permute, "s8", input=apart, axes=(0, 1, 3, 2, 4, 5))
    windows = draft.emit(p.Reshape, "s8", input=turned, shape=(-1, 4, 3))
    columns = draft.emit(p.Permute, "s8", input=windows, axes=(0, 2, 1))
    product = draft.emit(p.Product, "s32", left=windows, right=columns, left_zero=1, right_zero=-1)
    draft.emit(p.Reshape, "s32", input=product, shape=(-1, 4, 4, 4))
    return draft.vector("windows", "four windows of each image stand in the first axis, which is 4 N long there")


def _wider() -> Vector:
    draft = Draft("u8", 2, 3)
    draft.emit(p.Pad, "s16", input="x", amounts=(1, 1, 1, 0), value=-300)
    return draft.vector("pad-wider", "padded with what the input's type does not hold, and the output's does")


def _joins() -> Iterator[Vector]:
    draft = Draft("u8", 4, 6)
    token = draft.noisy("u8", 1, 1, 6)
    draft.emit(p.Concat, "u8", inputs=(token, "x", token), axis=1)
    yield draft.vector("concat-tokens", "a constant of one image is repeated for every image")
    draft = Draft("u4", 2, 3)
    draft.emit(p.Concat, "s16", inputs=("x", draft.noisy("s8", 1, 2, 2), "x"), axis=2)
    yield draft.vector("concat-types", "parts of several types, in a type that holds them all")
    draft = Draft("u8", 2, 3)
    turned = draft.emit(p.Permute, "u8", input="x", axes=(1, 0, 2))
    part = draft.emit(p.Slice, "u8", input=turned, axis=0, start=1, stop=2, step=1)
    joined = draft.emit(p.Concat, "u8", inputs=(turned, part), axis=0)
    draft.emit(p.Permute, "u8", input=joined, axes=(1, 0, 2))
    yield draft.vector("concat-first-axis", "images stand in the second axis; what has a first size of 1 is repeated")

"""Vectors of the instructions that sum: layers, products, gates, poolings."""

from __future__ import annotations

from collections.abc import Iterator

from vitquant.conformance.drafting import Draft, Vector
from vitquant.program import instructions as p

_CODES = ("u4", "s4", "u8", "s8", "u16", "s16")


def sums() -> Iterator[Vector]:
    """All vectors of these instructions."""
    for given, weights in zip(_CODES, ("s4", "u4", "s8", "u8", "s8", "s4"), strict=True):
        yield _linear(given, weights, plain=False)
    yield _linear("u8", "s4", plain=True)
    yield _linear("s8", "s16", plain=True)
    yield _only_zero_point()
    yield from _convolutions()
    yield from _products()
    yield from _poolings()


def _linear(given: str, weights: str, plain: bool) -> Vector:
    draft = Draft(given, 3, 6)
    low, high = draft.registers["x"].limits
    optional = {"bias": None, "weight_zero": None}
    if not plain:
        optional = {
            "bias": draft.constant("s32", [-(2**30), -1, 0, 1, 2**30]),
            "weight_zero": draft.noisy(weights, 5, 1),
        }
    zero = low if plain else (low + high) // 2
    draft.emit(p.Linear, "s32", input="x", weight=draft.noisy(weights, 5, 6), input_zero=zero, **optional)
    what = "neither bias nor zero points of weights" if plain else "bias and a zero point of each output's weights"
    return draft.vector(f"linear-{given}-{weights}{'-plain' * plain}", f"{given} codes, {weights} weights, {what}")


def _only_zero_point() -> Vector:
    draft = Draft("u8", 6)
    draft.emit(
        p.Linear, "s32", input="x", weight=draft.noisy("s8", 5, 6), bias=None, input_zero=7,
        weight_zero=draft.constant("s8", -77),
    )  # fmt: skip
    return draft.vector("linear-one-zero-point", "a zero point for the whole weight")


def _convolutions() -> Iterator[Vector]:
    cases = {
        "patches": ("u8", "s8", (4, 4), (4, 4), (0, 0), (1, 1), 1, "windows side by side"),
        "padded": ("u8", "s8", (3, 3), (1, 1), (1, 1), (1, 1), 1, "what is padded counts zero, which is no code 0"),
        "depthwise": ("s8", "s4", (3, 2), (2, 1), (1, 0), (1, 1), 4, "a group for each channel, sizes that differ"),
        "dilated": ("u4", "u4", (2, 3), (1, 2), (2, 3), (3, 2), 2, "windows with gaps, two groups"),
    }
    for name, (given, weights, kernel, stride, padding, dilation, groups, about) in cases.items():
        draft = Draft(given, 4, 8, 8)
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        biased, shifted = name != "patches", name in ("depthwise", "dilated")
        draft.emit(
            p.Convolution, "s32", input="x", weight=draft.noisy(weights, 8, 4 // groups, *kernel),
            bias=draft.noisy("s16", 8) if biased else None, input_zero=draft.registers["x"].limits[1] // 2 + 1,
            weight_zero=draft.noisy(weights, 8, 1, 1, 1, seed=2) if shifted else None, **geometry,
        )  # fmt: skip
        yield draft.vector(f"convolution-{name}", about)


def _products() -> Iterator[Vector]:
    draft = Draft("u8", 2, 3, 4)
    turned = draft.emit(p.Permute, "u8", input="x", axes=(0, 1, 3, 2))
    draft.emit(p.Product, "s32", left="x", right=turned, left_zero=128, right_zero=3)
    yield draft.vector("product-of-registers", "two registers with zero points, in each of two heads")
    draft = Draft("s16", 2, 3, 4)
    draft.emit(p.Product, "s32", left="x", right=draft.noisy("u8", 4, 5), left_zero=-7, right_zero=255)
    yield draft.vector("product-with-a-constant", "one matrix for every head; operands of 16 and 8 bits")
    draft = Draft("u4", 1, 3, 4)
    draft.emit(p.Product, "s32", left=draft.noisy("s8", 2, 5, 3), right="x", left_zero=0, right_zero=15)
    yield draft.vector("product-repeats", "an axis of size one, and one that is not there, are repeated")
    draft = Draft("s8", 3, 4)
    draft.emit(p.Multiply, "s32", left="x", right="x", left_zero=-128, right_zero=127)
    yield draft.vector("multiply", "a register with itself, element by element")
    draft = Draft("u8", 4, 3)
    gains = draft.constant("s32", [[-(2**31)], [2**31 - 1], [3], [-1]])
    wide = draft.emit(p.Multiply, "s64", left="x", right=gains, left_zero=200, right_zero=-9)
    wide = draft.emit(p.Multiply, "s64", left=wide, right="x", left_zero=0, right_zero=0)
    draft.emit(p.Requantize, "s8", inputs=(wide,), multipliers=(draft.constant("s32", [2**15, -(2**15), 1]),),
               addend=draft.constant("s64", 2**52), shift=53, low=-128, high=127)  # fmt: skip
    yield draft.vector("multiply-64-bits", "sums that only 64 bits hold, requantized; one factor for each row")


def _poolings() -> Iterator[Vector]:
    for name, axes, keep in (("sum-rows", (1,), False), ("sum-images", (3, 2), True), ("sum-all", (1, 2, 3), False)):
        draft = Draft("u8", 3, 4, 5)
        draft.emit(p.Sum, "s32", input="x", axes=axes, keep=keep, input_zero=131)
        yield draft.vector(name, f"over axes {axes}, {'each of size one then' if keep else 'which are gone then'}")

"""Vectors of the instructions that map codes to codes: softmax, norms, tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vitquant.conformance.drafting import Draft, Vector, codes_between, noise
from vitquant.integer.arithmetic import logarithm
from vitquant.integer.exponential import MOST_OCTAVES, OCTAVE_BITS, exact_exponential, polynomial_exponential
from vitquant.program import instructions as p

_ROW = 8
_NAMES = ("steps", "offset", "zero", "published")
_POWERS = {
    "halves": (1, 0, 15, False), "roots": (2, 0, 15, False), "published": (1, 0, 15, True),
    "offset": (1, -9000, 15, False), "offset-of-roots": (2, -30_000, 32, False), "offset-up": (2, 5000, 31, False),
    "one-power": (1, 0, 1, False), "published-16": (1, 0, 16, True),
}  # fmt: skip
_LEVELS = {
    "bytes": (255 << 22, 22, 0, 0, 255, "u8"), "signed": (2**31 - 1, 24, -128, -128, 127, "s8"),
    "finest": (2**31 - 1, 1, 0, 0, 2**31 - 1, "s32"), "coarse": (2**31 - 1, 28, 3, 4, 9, "u4"),
    "nothing": (2**31 - 1, 46, 7, -8, 7, "s4"), "zero": (0, 20, -1, -8, 7, "s4"),
}  # fmt: skip
# A mask for all rows, one for each row, and one for each head; they include fully masked rows, and one with one entry.
_MASKS = {
    "": None,
    "-mask-of-a-row": torch.tensor([0, 1, 0, 0, 1, 1, 0, 1]),
    "-mask-of-rows": torch.tensor([[0] * 8, [1] * 8, [1] * 7 + [0], [0, 1] * 4]),
    "-mask-of-heads": torch.tensor([[[0]], [[1]]]),
}


def operations_on_codes() -> Iterator[Vector]:
    """All vectors of these instructions."""
    for number, (mask, masked) in enumerate(_MASKS.items()):
        for name in list(_POWERS)[number :: len(_MASKS)] if number else _POWERS:
            yield _powers(f"{name}{mask}", name, masked)
        for name in list(_LEVELS)[number :: len(_MASKS)] if number else _LEVELS:
            yield _levels(f"{name}{mask}", name, masked)
    yield _scores_far_out()
    about = "row sums by which the logarithm's last digit shows"
    yield _row_sums("softmax-to-powers-last-digits", about, 57814)
    about = "row sums by which a logarithm shows whose intermediate numbers have fewer than 31 digits"
    yield _row_sums("softmax-to-powers-few-digits", about, 37436)
    yield _noisy_tables()
    for kind, name in ((p.LayerNorm, "layer-norm"), (p.RmsNorm, "rms-norm")):
        yield from _norms(kind, name)
    yield from _edges_of_norms()
    yield from _tables()


def _rows(low: int, high: int) -> torch.Tensor:
    """Scores with every distance, constant rows, and rows with one score far above the others."""
    codes = codes_between(low, high, 2, 4, _ROW)
    peak = torch.full((2, 4, _ROW), low)
    peak[..., 2] = high
    ladder = torch.linspace(low, high, 64).round().long().view(2, 4, _ROW).flip(-1)
    return torch.cat([codes, peak[None], ladder[None]])


def _tables_of(draft: Draft, scale: float, levels: int, polynomial: bool = False) -> dict[str, str]:
    table = (polynomial_exponential if polynomial else exact_exponential)(scale, levels)
    return {"values": draft.constant("u16", table.values), "octaves": draft.constant("s32", table.octaves)}


def _powers(name: str, form: str, mask: torch.Tensor | None) -> Vector:
    draft = Draft("u8", 2, 4, _ROW)
    given = dict(zip(_NAMES, _POWERS[form], strict=True))
    masked = None if mask is None else draft.constant("u8", mask)
    tables = _tables_of(draft, 0.7 if form in ("one-power", "roots") else 0.04, 256, polynomial=form == "published")
    type = "u4" if given["zero"] <= 15 else "u8"
    draft.emit(p.SoftmaxToPowers, type, input="x", mask=masked, **tables, **given)
    said = ", ".join(f"{key} {value}".lower() for key, value in given.items())
    return draft.vector(f"softmax-to-powers-{name}", f"{said}; {_masked(mask)}", _rows(0, 255))


def _levels(name: str, form: str, mask: torch.Tensor | None) -> Vector:
    draft = Draft("s8", 2, 4, _ROW)
    multiplier, shift, zero, low, high, type = _LEVELS[form]
    masked = None if mask is None else draft.constant("u8", mask)
    given = {"multiplier": multiplier, "shift": shift, "result_zero": zero, "low": low, "high": high}
    draft.emit(p.SoftmaxToLevels, type, input="x", mask=masked, **_tables_of(draft, 0.05, 256), **given)
    about = f"multiplier {multiplier}, shift {shift}, zero {zero}, codes {low} to {high}; {_masked(mask)}"
    return draft.vector(f"softmax-to-levels-{name}", about, _rows(-128, 127))


def _masked(mask: torch.Tensor | None) -> str:
    return "nothing is masked" if mask is None else f"a mask of {tuple(mask.shape)}"


def _scores_far_out() -> Vector:
    """32-bit scores in a narrow range far below zero: the tables have an entry for each score, and one for the mask."""
    draft = Draft("u4", 2, 4, _ROW)
    one, addend = draft.constant("s32", 2), draft.constant("s64", -(2**21))
    scores = draft.emit(p.Multiply, "s32", left="x", right=draft.constant("s8", 1), left_zero=10**6, right_zero=0)
    rows = _MASKS["-mask-of-rows"]
    assert rows is not None
    low = draft.constant("u8", rows)
    tables = _tables_of(draft, 0.3, 16)
    powers = {"zero": 15, "steps": 1, "offset": 0, "published": False}
    codes = draft.emit(p.SoftmaxToPowers, "u4", input=scores, mask=low, **tables, **powers)
    draft.emit(p.Requantize, "s32", inputs=(scores, codes), multipliers=(one, one), addend=addend, shift=1,
               low=-(2**31), high=2**31 - 1)  # fmt: skip
    about = "scores from -1000000 to -999985 of 32 bits, tables of 17 entries"
    return draft.vector("softmax-far-out", about, _rows(0, 15))


def _row_sums(name: str, about: str, exponential: int) -> Vector:
    """Codes that depend on the last digit of the logarithm of the row sum, for 1 to 64 equal entries in a row.

    For 33 entries of 57814 the logarithm that the format defines is one less than the floor of the real one. For 7
    numbers of entries of 37436 it differs when intermediate numbers have 30 digits or fewer in place of 31.
    """
    draft, levels = Draft("u16", 64, 64), 4096
    scores = draft.emit(
        p.Requantize, "u16", inputs=("x",), multipliers=(draft.constant("s32", 2),), addend=draft.constant("s64", 0),
        shift=1, low=0, high=levels - 1,
    )  # fmt: skip
    counts = torch.arange(1, 65)
    tables = {
        "mask": draft.constant("u8", (torch.arange(64) >= counts[:, None]).long()),
        "values": draft.constant("u16", [*[exponential] * levels, 0]),
        "octaves": draft.constant("s32", [*range(levels), MOST_OCTAVES]),
    }
    powers = {"zero": 32, "steps": 2, "offset": 0, "published": False}
    draft.emit(p.SoftmaxToPowers, "u8", input=scores, **tables, **powers)
    codes = noise(9, 0, levels - 1, 1, 64, 64)
    distance = -(logarithm(counts * exponential, OCTAVE_BITS) + 1024) % 2048  # the smallest distance with the next code
    for column, offset in enumerate((0, 2047, 2048, 2049), 1):
        codes[0, :, column] = levels - 1 - (distance + offset).clamp(0, levels - 1)
    codes[..., 0] = levels - 1
    return draft.vector(name, about, codes)


def _noisy_tables() -> Vector:
    draft = Draft("u8", 32, 64)
    values = draft.constant("u16", noise(8, 0, 65535, 257))
    tables = {"values": values, "octaves": draft.constant("s32", torch.arange(257) * 16)}
    draft.emit(p.SoftmaxToPowers, "u8", input="x", mask=None, **tables, zero=16, steps=1, offset=0, published=True)
    codes = noise(9, 0, 255, 1, 32, 64)
    codes[..., 0] = 255
    return draft.vector("softmax-to-powers-noise", "the published rounding of tables that are no exponentials", codes)


def _norms(kind: type[p.Norm], of: str) -> Iterator[Vector]:
    cases = {  # type, channels, zero, epsilon, the largest factor
        "plain": ("u8", 24, 0, 1, 0), "factors": ("u8", 24, 128, 40_000, 3), "signed": ("s8", 6, -7, 1, 3),
        "wide": ("s16", 24, 0, 2**40, 0), "widest": ("s16", 24, 0, 1, 10), "largest-epsilon": ("s16", 24, 9, 2**60, 3),
        "one-channel": ("u8", 1, 3, 1, 0), "two-channels": ("u4", 2, 15, 1, 0),
    }  # fmt: skip
    for name, (given, channels, zero, epsilon, factor) in cases.items():
        gains = noise(5, -(2**22), 2**22, channels)
        gains[0], gains[-1] = 2**22, 0 if channels > 1 else 2**22
        affine = {"multiplier": gains, "addend": noise(6, -(2**38), 2**38, channels), "shift": 32, "low": -120}
        about = f"{channels} channels of {given}, zero {zero}, epsilon {epsilon}, factors up to {factor}"
        draft, codes = _normalized(kind, given, channels, zero, epsilon, factor, "s8", {**affine, "high": 127})
        yield draft.vector(f"{of}-{name}", f"{about}; constant rows, a gain of zero", codes)
        whole = {"multiplier": [2], "addend": 0, "shift": 1, "low": -(2**31), "high": 2**31 - 1}
        draft, codes = _normalized(kind, given, channels, zero, epsilon, factor, "s32", whole)
        yield draft.vector(f"{of}-{name}-digits", f"{about}; all 16 digits of the normalized values", codes)


def _edges_of_norms() -> Iterator[Vector]:
    """Cases that show whether a step of a formula is left out: halves, guard bits, and roots of large numbers."""
    whole = {"shift": 1, "low": -(2**31), "high": 2**31 - 1, "input_zero": 0, "factors": None}
    root = [[2**10 * each for each in (1, 15, 5, 2, 1, 0, 0, 0)]]
    cases: dict[str, tuple[type[p.Norm], int, int, list[list[int]], str]] = {
        # name: kind, epsilon, largest, rows, about
        "layer-norm-halves": (p.LayerNorm, 2**36 - 4, 8, [[1, -1], [-1, 1]], "a product that ends in one half exactly"),
        "rms-norm-halves": (p.RmsNorm, 2**34 - 1, 8, [[1], [-1]], "a product that ends in one half exactly"),
        "layer-norm-guard-bits": (p.LayerNorm, 2, 379_625_063, [[1, 0], [5, -2]], "60 bits: one guard bit"),
        "rms-norm-guard-bits": (p.RmsNorm, 2, 759_250_125, [[1], [-3]], "60 bits: one guard bit"),
        "rms-norm-root": (p.RmsNorm, 2**60, 2**15, root, "a root that is one less than that of the nearest float"),
    }
    for name, (kind, epsilon, largest, rows, about) in cases.items():
        draft = Draft("s32", 1, len(rows[0]))
        narrow = draft.emit(
            p.Requantize, "s32", inputs=("x",), multipliers=(draft.constant("s32", 2),),
            addend=draft.constant("s64", 0), shift=1, low=-largest, high=largest,
        )  # fmt: skip
        multiplier, addend = draft.constant("s32", [2]), draft.constant("s64", 0)
        draft.emit(
            kind, "s32", input=narrow, epsilon=epsilon, largest=largest, multiplier=multiplier, addend=addend, **whole
        )
        yield draft.vector(name, f"epsilon {epsilon}: {about}", torch.tensor(rows)[:, None])


def _normalized(
    kind: type[p.Norm],
    given: str,
    channels: int,
    zero: int,
    epsilon: int,
    factor: int,
    written: str,
    affine: dict[str, Any],
) -> tuple[Draft, torch.Tensor]:
    """A program with a norm, and codes with rows of noise, constant rows and nearly constant rows."""
    draft = Draft(given, 5, channels)
    low, high = draft.registers["x"].limits
    factors = draft.constant("u8", noise(7, factor - 3, factor, channels)) if factor else None
    multiplier, addend = draft.constant("s32", affine["multiplier"]), draft.constant("s64", affine["addend"])
    most = max(abs(low - zero), abs(high - zero)) << factor
    draft.emit(
        kind, written, input="x", factors=factors, input_zero=zero, epsilon=epsilon, largest=most,
        **{**affine, "multiplier": multiplier, "addend": addend},
    )  # fmt: skip
    near = torch.full((1, 5, channels), high)
    near[..., 0] -= torch.arange(5)
    return draft, torch.cat([codes_between(low, high, 5, channels), near, noise(10, low, high, 8, 5, channels)])


def _tables() -> Iterator[Vector]:
    for given, written in (("u4", "s8"), ("s4", "u16"), ("u8", "s16"), ("s8", "u4"), ("s16", "s32"), ("u8", "s64")):
        low, high = p.type_limits(given)
        draft = Draft(given, 16)
        if given == "s16":  # a table with entries before the first code and after the last
            draft.emit(p.Requantize, "s8", inputs=("x",), multipliers=(draft.constant("s32", 1),),
                       addend=draft.constant("s64", 0), shift=12, low=-8, high=7)  # fmt: skip
            draft.emit(p.Lookup, written, input="r0", table=draft.noisy(written, 20), lowest=-10)
        else:
            draft.emit(p.Lookup, written, input="x", table=draft.noisy(written, high - low + 1), lowest=low)
        codes = torch.cat([codes_between(low, high, 16), torch.arange(low, low + 16)[None]])
        yield draft.vector(f"lookup-{given}-{written}", f"a table of {written} for codes of {given}", codes)

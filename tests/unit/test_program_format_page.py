"""docs/program-format.md says of every instruction what the code reads and writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import assert_never

import pytest

from vitquant.integer import arithmetic, exponential, layer_norm, softmax
from vitquant.program import checking, opcodes, storage
from vitquant.program.instructions import TYPES, type_limits
from vitquant.program.opcodes import OPCODES, form

PAGE = (Path(__file__).parents[2] / "docs" / "program-format.md").read_text()
START = re.compile(r"^\*\*(\w+)\*\*: |^### (\w+)$", re.MULTILINE)


def tables() -> dict[str, list[tuple[str, str]]]:
    """For every opcode the keys and kinds that the page lists, in its order."""
    part = PAGE[PAGE.index("## Instructions") : PAGE.index("## Valid programs")]
    starts = [*START.finditer(part)]
    ends = [each.start() for each in starts[1:]] + [len(part)]
    found = {
        each[1] or each[2]: re.findall(r"^\| `(\w+)` \| ([^|]*?) \|", part[each.end() : end], re.MULTILINE)
        for each, end in zip(starts, ends, strict=True)
    }
    shared = found.pop("softmax")
    return {name: (shared if name.startswith("softmax") else []) + rows for name, rows in found.items() if rows}


def power(number: int) -> str:
    """A number as the page writes it."""
    if abs(number) < 1000:
        return str(number)
    length = (abs(number) - 1).bit_length()
    if abs(number) == 2**length:
        return f"{'-' * (number < 0)}2^{length}"
    assert number == 2**length - 1
    return f"2^{length} - 1"


def kind(role: opcodes.Role) -> str:
    """What the page calls it."""
    match role:
        case opcodes.Read(several):
            return "registers" if several else "register"
        case opcodes.Constant(type, optional, several):
            return "constant" + "s" * several + f" {type}" * bool(type) + " or null" * optional
        case opcodes.Number(low, high, several):
            limits = "" if (low, high) == (-(2**62), 2**62) else f", {power(low)}..{power(high)}"
            return f"number{'s' * several}{limits}"
        case opcodes.Flag():
            return "flag"
        case _:
            assert_never(role)


@pytest.mark.parametrize("opcode", OPCODES)
def test_the_page_lists_the_arguments_of_every_opcode(opcode):
    assert tables()[opcode] == [(argument.key, kind(argument.role)) for argument in form(opcode).arguments]


def test_the_page_has_no_other_opcodes():
    assert tables().keys() == set(OPCODES)


def test_the_page_has_every_type_with_its_ends():
    lines = (re.search(rf"^\| {word} .*$", PAGE, re.MULTILINE) for word in ("type", "lowest", "highest"))
    names, lows, highs = ([cell.strip() for cell in line[0].strip("|").split("|")][1:] for line in lines if line)
    assert names == list(TYPES)
    written = {f"2^{bits} - 1": 2**bits - 1 for bits in (31, 63)} | {f"-2^{bits}": -(2**bits) for bits in (31, 63)}
    low, high = ([written[cell] if cell in written else int(cell) for cell in cells] for cells in (lows, highs))
    assert list(zip(low, high, strict=True)) == [type_limits(name) for name in TYPES]


def test_a_constant_of_the_page_is_not_changed_alone():
    """Who changes one of these changes what programs compute, or which are valid: the page and `FORMAT` follow."""
    assert (storage.FORMAT, storage._KEY, storage._AFTER, storage._LONGEST_HEADER) == (3, "vitquant_program", 66, 2**23)
    assert (exponential.VALUE_BITS, exponential.OCTAVE_BITS, exponential.MOST_OCTAVES) == (15, 12, 2**18 - 1)
    assert (softmax.ROW_BITS, softmax.LONGEST_ROW, softmax.LARGEST_OFFSET) == (16, 2**15, 2**17)
    assert (layer_norm.NORMALIZED_BITS, layer_norm.RECIPROCAL_BITS, layer_norm._ROOT_BITS) == (16, 50, 62)
    assert layer_norm.guard_bits(1, 1, 1) == 12
    assert (softmax.step_bits(1), softmax.step_bits(2)) == (12, 11)
    assert arithmetic.MULTIPLIER_BITS == 31
    assert (opcodes.LARGEST_RANK, checking._LONGEST_NAME, checking._MOST_ELEMENTS) == (16, 1000, 2**32)
    assert f"integer programs, format {storage.FORMAT}:" in PAGE

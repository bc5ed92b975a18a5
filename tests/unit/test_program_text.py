"""The text form of a program has everything that the file has, one instruction a line."""

from __future__ import annotations

import re
from dataclasses import fields

import torch
from small_programs import everything

from vitquant.program import instructions as p
from vitquant.program.opcodes import OPCODES, form, form_of, opcode_of
from vitquant.program.text import text_form

WHOLE = """\
input x: u8[N, 4, 6]  # scale 0.1, zero point 3, codes 0..255
n: u8[N, 4, 6] = layer_norm(input=x, factors=factors: u8[6], input_zero=7, epsilon=5, largest=1984, \
multiplier=gain: s32[6], addend=shift: s64[6], shift=30, low=0, high=255)  # norm
a: s32[N, 4, 5] = linear(input=n, weight=weight: s8[5, 6] scale 0.5..0.75, bias=bias: s32[5], input_zero=9, \
weight_zero=weight_zero: s8[5, 1])  # linear
q: u8[N, 4, 5] = requantize(inputs=[a], multipliers=[m: s32[] *0.00390625], addend=half: s64[], shift=28, low=0, \
high=255)  # query scale 0.25
"""


def test_every_instruction_is_one_line_with_types_shapes_and_scales():
    whole = everything()
    lines = text_form(whole, {"q": (0.25, 0.25), "weight": (0.5, 0.75)})
    assert "\n".join(lines[:4]) + "\n" == WHOLE
    assert lines[-1] == "output output = y: s8[N, 5]  # scale 0.2, zero point 0"
    assert len(lines) == len(whole.instructions) + 2
    assert lines == text_form(whole, {"q": (0.25, 0.25), "weight": (0.5, 0.75)})


def test_every_argument_is_in_the_line():
    for line, i in zip(text_form(everything())[1:-1], everything().instructions, strict=True):
        keys = re.findall(r"(\w+)=", line.partition(" = ")[2])
        assert keys == [argument.key for argument in form_of(i).arguments]
        assert f" = {opcode_of(i)}(" in line


def test_what_is_absent_is_none_and_multipliers_that_differ_have_both_ends():
    registers = {"x": p.Register("s32", (-1, 3)), "y": p.Register("u8", (-1, 3)), "z": p.Register("s32", (-1, 2))}
    constants = {"m": torch.tensor([1, -2, 4]), "a": torch.tensor(0), "w": torch.ones(2, 3).long()}
    registers |= {name: p.Register("s32", tuple(values.shape)) for name, values in constants.items()}
    steps = (p.Requantize("y", "s", ("x",), ("m",), "a", 1, 0, 9), p.Linear("z", "s", "y", "w", None, 0, None))
    lines = text_form(p.IntegerProgram("x", {"output": "z"}, registers, constants, steps))
    assert "multipliers=[m: s32[3] *-1..2]" in lines[1]
    assert "bias=none, input_zero=0, weight_zero=none" in lines[2]
    assert (lines[0], lines[-1]) == ("input x: s32[N, 3]", "output output = z: s32[N, 2]")


def test_a_size_that_grows_says_how_often():
    steps = (p.Reshape("y", "windows", "x", (-1, 2, 6)),)
    registers = {"x": p.Register("u8", (-1, 4, 6)), "y": p.Register("u8", (-1, 2, 6))}
    lines = text_form(p.IntegerProgram("x", {"output": "y"}, registers, {}, steps))
    assert lines[1] == "y: u8[2N, 2, 6] = reshape(input=x, shape=[-1, 2, 6])  # windows"


# The words of files.


def test_every_instruction_has_an_opcode_and_every_field_a_key():
    assert len(OPCODES) == len(set(OPCODES)) == len(p.INSTRUCTIONS)
    assert {form(opcode).kind for opcode in OPCODES} == set(p.INSTRUCTIONS)
    for opcode in OPCODES:
        found = form(opcode)
        assert re.fullmatch("[a-z_]+", opcode)
        own = {field.name for field in fields(found.kind)} - {"output", "site"}
        assert {argument.field or argument.key for argument in found.arguments} == own
        keys = [argument.key for argument in found.arguments]
        assert len(set(keys)) == len(keys)
        assert not {"op", "output", "site"} & set(keys)


def test_an_opcode_is_that_of_its_form():
    for i in everything().instructions:
        assert form(opcode_of(i)).kind is type(i)

"""Whether a program is one that the interpreter may run: nothing is left to find out while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from math import inf, prod

import torch

from vitquant.errors import LoweringError
from vitquant.integer.exponential import MOST_OCTAVES
from vitquant.integer.softmax import LARGEST_OFFSET
from vitquant.program import instructions as p
from vitquant.program.ranges import prove_ranges
from vitquant.program.shapes import Shape, written_shape

_LARGEST_RANK = 16
_LONGEST_NAME = 1000
_MOST_ELEMENTS = 2**32  # that all instructions read and write for one image; a ViT-g with its weights has half of them

# Fields that name a constant, not a register.
_CONSTANTS = {
    "weight", "bias", "weight_zero", "multipliers", "addend", "hidden", "values", "octaves", "factors", "multiplier",
    "table",
}  # fmt: skip
_TABLES = {"values": "u16", "octaves": "s32", "multiplier": "s32", "multipliers": "s32"}


def check_program(program: p.IntegerProgram) -> None:
    """Refuse a program that is not valid, whoever made it.

    Every operand is known and every register written once; shapes follow from what is read, for any number of images;
    constants have the type and shape that is said of them; numbers lie where the definitions of the operations hold;
    and no sum overflows (`prove_ranges`).

    Arguments:
        program: its fields have the Python types that they are declared with.

    Raises:
        LoweringError: it is not valid; the message names the site, register or constant.
    """
    for name, register in program.registers.items():
        check_register(name, register)
    for name in program.constants:
        _check_constant(program, name)
    _check_flow(program)
    _check_facts(program)
    prove_ranges(program)


def _refuse(where: str, reason: str) -> LoweringError:
    return LoweringError(f"{where}: {reason}; the program is not valid")


def check_register(name: str, register: p.Register) -> None:
    """Refuse a register whose name, type or shape no register has.

    Raises:
        LoweringError: it names the register.
    """
    if not _is_name(name):
        raise _refuse(repr(name[:80]), "no name that can be printed")
    if register.type not in p.TYPES:
        raise _refuse(name, f"no type {register.type[:80]!r}")
    shape = register.shape
    if len(shape) > _LARGEST_RANK or not all(0 < size <= _MOST_ELEMENTS or size == -1 for size in shape):
        raise _refuse(name, f"no shape {str(shape[:_LARGEST_RANK])[:80]}")
    if shape.count(-1) > 1:
        raise _refuse(name, f"two sizes of {shape} grow with the batch")


def _is_name(name: str) -> bool:
    return name.isprintable() and 0 < len(name) <= _LONGEST_NAME


def _check_constant(program: p.IntegerProgram, name: str) -> None:
    if name not in program.registers:
        raise _refuse(repr(name[:80]), "a constant without a register")
    register, values = program.registers[name], program.constants[name]
    if values.dtype is not torch.int64 or tuple(values.shape) != register.shape:
        raise _refuse(name, f"{values.dtype} of {tuple(values.shape)}, not int64 of {register.shape}")
    low, high = (int(bound) for bound in torch.aminmax(values))
    if low < register.limits[0] or high > register.limits[1]:
        raise _refuse(name, f"values from {low} to {high} are not {register.type}")


def _check_flow(program: p.IntegerProgram) -> None:
    """Names, fields and shapes, one instruction after another."""
    shapes: dict[str, Shape] = {name: tuple(values.shape) for name, values in program.constants.items()}
    given = program.registers.get(program.input, p.Register("s64", ()))
    if given.shape[:1] != (-1,):
        raise _refuse("input", "no register whose first size is the batch")
    shapes[program.input] = given.shape
    elements = 0
    for instruction in program.instructions:
        if not _is_name(instruction.site):
            raise _refuse(repr(instruction.site[:80]), "no site that can be printed")
        _check_fields(program, instruction, shapes)
        shape = written_shape(instruction, shapes)
        _check_written(program, instruction, shape, shapes)
        shapes[instruction.output] = shape
        elements += sum(prod(map(abs, shapes[name])) for name in (*p.reads(instruction), instruction.output))
        if elements > _MOST_ELEMENTS:
            raise _refuse(instruction.site, f"up to here more than {_MOST_ELEMENTS} elements for one image")
    for name in program.registers.keys() - shapes.keys():
        raise _refuse(name, "a register that is never written")
    if program.output in program.constants or program.output == program.input or program.output not in shapes:
        raise _refuse("output", "no register that an instruction writes")
    if shapes[program.output][:1] != (-1,):
        raise _refuse("output", f"its first size is not the batch but that of {shapes[program.output]}")
    for value, name in program.codes.items():
        if not _is_name(value) or name not in shapes:
            raise _refuse("codes", f"no register {name[:80]!r} for {value[:80]!r}")


def _check_facts(program: p.IntegerProgram) -> None:
    """What input and output stand for, where that is said."""
    scales_of = {"input": (None,), "output": (1, program.registers[program.output].shape[-1])}
    for end in program.facts.keys() & scales_of.keys():
        match program.facts[end]:
            case {"scale": float() | list() as scale, "zero_point": int(zero)} if abs(zero) < 2**31:
                count, scales = (len(scale), scale) if isinstance(scale, list) else (None, [scale])
                if count in scales_of[end] and all(isinstance(each, float) and 0 < each < inf for each in scales):
                    _check_codes_of(program, end)
                    continue
        raise _refuse(end, "no scale and zero point")


def _check_codes_of(program: p.IntegerProgram, end: str) -> None:
    """The lowest and the highest code of an image."""
    if end != "input":
        return
    least, most = program.registers[program.input].limits
    match program.facts[end]:
        case {"low": int(low), "high": int(high)} if least <= low < high <= most:
            return
    raise _refuse(end, f"no lowest and highest code between {least} and {most}")


def _check_written(program: p.IntegerProgram, i: p.Instruction, shape: Shape, known: dict[str, Shape]) -> None:
    if i.output in known:
        raise _refuse(i.site, f"register {i.output} is written twice")
    if i.output not in program.registers:
        raise _refuse(i.site, f"no register {i.output[:80]!r}")
    declared = program.registers[i.output].shape
    if declared != tuple(max(size, -1) for size in shape):
        raise _refuse(i.site, f"register {i.output} is of {shape}, not {declared}")


def _check_fields(program: p.IntegerProgram, i: p.Instruction, known: dict[str, Shape]) -> None:
    """What each field must be whatever the others are."""
    if type(i) not in p.INSTRUCTIONS:
        raise _refuse(i.site, f"no instruction {type(i).__name__}")
    for name, value in _values(i):
        if isinstance(value, str):
            if value not in known:
                raise _refuse(i.site, f"{name} {value[:80]!r} is not known before")
            if name in _CONSTANTS and value not in program.constants:
                raise _refuse(i.site, f"{name} {value} is no constant")
            if name in _TABLES and program.registers[value].type != _TABLES[name]:
                raise _refuse(i.site, f"{name} {value} is not of {_TABLES[name]}")
        elif isinstance(value, int) and not isinstance(value, bool):
            low, high = _limits(i, name)
            if not low <= value <= high:
                raise _refuse(i.site, f"{name} {value} is not from {low} to {high}")
    _check_together(program, i)


def _values(i: p.Instruction) -> Iterator[tuple[str, object]]:
    """Fields by name, tuples one by one."""
    for field in fields(i):
        value = getattr(i, field.name)
        if field.name not in ("output", "site"):
            yield from ((field.name, each) for each in (value if isinstance(value, tuple) else (value,)))


def _limits(i: p.Instruction, name: str) -> tuple[int, int]:
    """The smallest and the largest value that a number may be."""
    match i, name:
        case p.UniformSoftmax(), "multiplier":
            return 0, 2**31 - 1
        case p.UniformSoftmax(), "shift":
            return 1, 46  # 16 more are shifted, and halves are added before
        case _, "shift":
            return 1, 62
        case p.LogSoftmax(), "zero":
            return 1, 16 * i.steps
        case p.LogSoftmax(), "steps":
            return 1, 2
        case p.LogSoftmax(), "offset":
            return -LARGEST_OFFSET, LARGEST_OFFSET
        case p.LayerNorm(), "epsilon":
            return 1, 2**60
        case p.Convolution(), "stride" | "dilation" | "groups":
            return 1, 2**31
        case p.Convolution(), "padding":
            return 0, 2**31
        case _, "axis" | "axes":
            return 0, _LARGEST_RANK - 1
        case _, "shape":
            return -1, 2**62
        case _:
            return -(2**62), 2**62


def _check_together(program: p.IntegerProgram, i: p.Instruction) -> None:
    """What some fields must be beside others, and some constants beside their type."""
    numbers = [value for value in vars(i).values() if isinstance(value, tuple) and value and isinstance(value[0], int)]
    if any(len(value) > 2 * _LARGEST_RANK for value in numbers):
        raise _refuse(i.site, "too many axes")
    match i:
        case p.Requantize() | p.UniformSoftmax() | p.LayerNorm() if i.low > i.high:
            raise _refuse(i.site, f"nothing lies from {i.low} to {i.high}")
        case p.Convolution() if not len(i.stride) == len(i.padding) == len(i.dilation) == 2:
            raise _refuse(i.site, "no two-dimensional convolution")
        case p.LayerNorm() if i.factors and bool((program.constants[i.factors] >> 5).any()):
            raise _refuse(i.site, f"{i.factors} is not from 0 to 31")
        case p.LogSoftmax() | p.UniformSoftmax() if i.hidden and bool((program.constants[i.hidden] >> 1).any()):
            raise _refuse(i.site, f"{i.hidden} is not 0 or 1")
        case p.LogSoftmax() | p.UniformSoftmax() if bool((program.constants[i.octaves] & ~MOST_OCTAVES).any()):
            raise _refuse(i.site, f"{i.octaves} is not from 0 to {MOST_OCTAVES}")
        case p.LogSoftmax(published=True) if (i.steps, i.offset) != (1, 0):
            raise _refuse(i.site, "the published rounding is to powers of two that begin at 1")

"""Validation of a program before it is run, so that the interpreter needs no checks while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import assert_never

import torch

from vitquant.errors import LoweringError
from vitquant.integer.exponential import MOST_OCTAVES
from vitquant.program import instructions as p
from vitquant.program.opcodes import LARGEST_RANK, Argument, Constant, Flag, Number, Read, form_of, reads
from vitquant.program.ranges import prove_ranges
from vitquant.program.shapes import Shape, written_shape

_SCALES = 2.0**-126, 2.0**127  # normal numbers of float32
_LONGEST_NAME = 1000
_MOST_OUTPUTS = 1024
_MOST_ELEMENTS = 2**32  # read and written by all instructions for one image, weights included; a ViT-g needs half


def check_program(program: p.IntegerProgram) -> None:
    """Refuse a program that is not valid, whoever made it.

    In a valid program every operand is written before it is read, and every register is written once; shapes follow
    from those of the operands, for any number of images; constants have their declared type and shape; numbers lie in
    the ranges for which the operations are defined; and no sum overflows (`prove_ranges`).

    Arguments:
        program: its fields have their declared Python types.

    Raises:
        LoweringError: the program is not valid; the message names the site, register or constant.
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
    """Refuse a register whose name, type or shape is not valid.

    Raises:
        LoweringError: it is not; the message names the register.
    """
    if not _is_name(name):
        raise _refuse(repr(name[:80]), "no name that can be printed")
    if register.type not in p.TYPES:
        raise _refuse(name, f"no type {register.type[:80]!r}")
    shape = register.shape
    if len(shape) > LARGEST_RANK or not all(0 < size <= _MOST_ELEMENTS or size == -1 for size in shape):
        raise _refuse(name, f"no shape {str(shape[:LARGEST_RANK])[:80]}")
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
    """Check names, arguments and shapes, one instruction after another."""
    shapes: dict[str, Shape] = {name: tuple(values.shape) for name, values in program.constants.items()}
    given = program.registers.get(program.input, p.Register("s64", ()))
    if given.shape[:1] != (-1,):
        raise _refuse("input", "no register whose first size is the batch")
    shapes[program.input] = given.shape
    elements = 0
    for instruction in program.instructions:
        if not _is_name(instruction.site):
            raise _refuse(repr(instruction.site[:80]), "no site that can be printed")
        _check_arguments(program, instruction, shapes)
        shape = written_shape(instruction, shapes)
        _check_written(program, instruction, shape, shapes)
        shapes[instruction.output] = shape
        elements += sum(prod(map(abs, shapes[name])) for name in (*reads(instruction), instruction.output))
        if elements > _MOST_ELEMENTS:
            raise _refuse(instruction.site, f"up to here more than {_MOST_ELEMENTS} elements for one image")
    for name in program.registers.keys() - shapes.keys():
        raise _refuse(name, "a register that is never written")
    if not 0 < len(program.outputs) <= _MOST_OUTPUTS:
        raise _refuse("outputs", f"{len(program.outputs)} are not from 1 to {_MOST_OUTPUTS}")
    for name, register in program.outputs.items():
        if not _is_name(name):
            raise _refuse(repr(name[:80]), "no name of an output that can be printed")
        if register in program.constants or register == program.input or register not in shapes:
            raise _refuse(f"output {name}", "no register that an instruction writes")
        if shapes[register][:1] != (-1,):
            raise _refuse(f"output {name}", f"its first size is not the batch but that of {shapes[register]}")
    for value, name in program.codes.items():
        if not _is_name(value) or name not in shapes:
            raise _refuse("codes", f"no register {name[:80]!r} for {value[:80]!r}")


def _check_facts(program: p.IntegerProgram) -> None:
    """Check scales and zero points of input and outputs, where the facts have them."""
    given, results = program.facts.get("input"), program.facts.get("outputs", {})
    if given is not None:
        match given:
            case {"scale": float(scale), "zero_point": int(zero), "low": low, "high": high, **more} if not more:
                _check_quantization("input", [scale], zero)
            case _:
                raise _refuse("input", "no scale and zero point, lowest and highest code")
        least, most = program.registers[program.input].limits
        if not (isinstance(low, int) and isinstance(high, int) and least <= low < high <= most):
            raise _refuse("input", f"no lowest and highest code between {least} and {most}")
    if not isinstance(results, Mapping) or not results.keys() <= program.outputs.keys():
        raise _refuse("outputs", "the facts name an output that the program does not have")
    for name, result in results.items():
        match result:
            case {"scale": list(scales), "zero_point": int(zero), **more} if not more:
                _check_quantization(f"output {name}", scales, zero)
            case _:
                raise _refuse(f"output {name}", "no scale and zero point")
        if len(scales) not in (1, program.registers[program.outputs[name]].shape[-1]):
            raise _refuse(f"output {name}", "no scale for all or for each of its last axis")


def _check_quantization(end: str, scales: list[object], zero: int) -> None:
    if abs(zero) >= 2**31 or not all(isinstance(each, float) and _SCALES[0] <= each < _SCALES[1] for each in scales):
        raise _refuse(end, "no scale and zero point")


def _check_written(program: p.IntegerProgram, i: p.Instruction, shape: Shape, known: dict[str, Shape]) -> None:
    if i.output in known:
        raise _refuse(i.site, f"register {i.output} is written twice")
    if i.output not in program.registers:
        raise _refuse(i.site, f"no register {i.output[:80]!r}")
    declared = program.registers[i.output].shape
    if declared != tuple(max(size, -1) for size in shape):
        raise _refuse(i.site, f"register {i.output} is of {shape}, not {declared}")


def _check_arguments(program: p.IntegerProgram, i: p.Instruction, known: Mapping[str, Shape]) -> None:
    """Check each argument by itself, and arguments that depend on each other."""
    if type(i) not in p.INSTRUCTIONS:
        raise _refuse(i.site, f"no instruction {type(i).__name__}")
    for argument in form_of(i).arguments:
        role, values = argument.role, argument.values(i)
        match role:
            case Read() | Constant():
                for name in values:
                    _check_read(program, i, argument, str(name), known)
            case Number(low, high):
                if len(values) > 2 * LARGEST_RANK:
                    raise _refuse(i.site, f"{argument.key} has too many axes")
                for number in values:
                    if not isinstance(number, int) or not low <= number <= high:
                        raise _refuse(i.site, f"{argument.key} {number} is not from {low} to {high}")
            case Flag():
                pass
            case _:
                assert_never(role)
    _check_together(program, i)


def _check_read(
    program: p.IntegerProgram, i: p.Instruction, argument: Argument, name: str, known: Mapping[str, Shape]
) -> None:
    if name not in known:
        raise _refuse(i.site, f"{argument.key} {name[:80]!r} is not known before")
    if isinstance(argument.role, Constant):
        if name not in program.constants:
            raise _refuse(i.site, f"{argument.key} {name} is no constant")
        if argument.role.type not in ("", program.registers[name].type):
            raise _refuse(i.site, f"{argument.key} {name} is not of {argument.role.type}")


def _check_together(program: p.IntegerProgram, i: p.Instruction) -> None:
    """Check arguments that depend on each other, and restrictions of constants beyond their type."""
    match i:
        case p.Requantize():
            _check_bounds(i)
        case p.Convolution():
            if not len(i.stride) == len(i.padding) == len(i.dilation) == 2:
                raise _refuse(i.site, "no two-dimensional convolution")
        case p.LayerNorm() | p.RmsNorm():
            _check_bounds(i)
            if i.factors and bool((program.constants[i.factors] >> 5).any()):
                raise _refuse(i.site, f"{i.factors} is not from 0 to 31")
        case p.SoftmaxToPowers():
            _check_tables(program, i)
            if i.zero > 16 * i.steps:
                raise _refuse(i.site, f"zero {i.zero} is not from 1 to {16 * i.steps}")
            if i.published and (i.steps, i.offset) != (1, 0):
                raise _refuse(i.site, "the published rounding is to powers of two that begin at 1")
        case p.SoftmaxToLevels():
            _check_tables(program, i)
            _check_bounds(i)
        case p.Linear() | p.Product() | p.Multiply() | p.Lookup() | p.Sum() | p.Concat():
            pass
        case p.Reshape() | p.Permute() | p.Slice() | p.Roll() | p.Pad():
            pass
        case _:
            assert_never(i)


def _check_bounds(i: p.Requantize | p.Norm | p.SoftmaxToLevels) -> None:
    if i.low > i.high:
        raise _refuse(i.site, f"nothing lies from {i.low} to {i.high}")


def _check_tables(program: p.IntegerProgram, i: p.Softmax) -> None:
    if i.mask and bool((program.constants[i.mask] >> 1).any()):
        raise _refuse(i.site, f"{i.mask} is not 0 or 1")
    if bool((program.constants[i.octaves] & ~MOST_OCTAVES).any()):
        raise _refuse(i.site, f"{i.octaves} is not from 0 to {MOST_OCTAVES}")

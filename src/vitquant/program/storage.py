"""An integer program as one file: safetensors, with the constants packed and the program as JSON in its metadata.

docs/program-format.md is the specification.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import Tensor

from vitquant.errors import CheckpointError, LoweringError
from vitquant.files import write_file
from vitquant.packing import pack, packed_size, unpack
from vitquant.parsing import parse_json, read_file
from vitquant.program import instructions as p
from vitquant.program import opcodes
from vitquant.program.checking import check_program, check_register
from vitquant.program.opcodes import form, form_of, opcode_of
from vitquant.schema import (
    Flag,
    Integer,
    ListOf,
    Number,
    Plain,
    Row,
    Schema,
    Table,
    TableOf,
    Text,
    check,
    maybe,
    shown,
    take,
)

FORMAT = 3
_KEY = "vitquant_program"  # a single key, since the order of several in the file is not defined
_AFTER = 66  # characters at the end that the digest leaves out: its own 64 digits, a quotation mark and a brace
_LARGEST = 2**36  # bytes of a file; loading holds constants packed and in 64 bits
_LONGEST_HEADER = 2**23  # bytes; the header of a DeiT has 2**18


def save_program(program: p.IntegerProgram, path: str | Path, force: bool = False) -> None:
    """Write a program to one file; the same program gives the same bytes.

    Arguments:
        program: what `lower` returned.
        path: of the file; its folder is created when missing.
        force: replace an existing file.

    Raises:
        LoweringError: the program is not valid.
        ExportError: the file cannot be written.
        CheckpointError: safetensors is not installed.
    """
    write_file(Path(path), to_bytes(program), force)


def to_bytes(program: p.IntegerProgram) -> bytes:
    """The content of a program's file.

    Raises:
        LoweringError: the program is not valid.
        CheckpointError: safetensors is not installed.
    """
    check_program(program)
    packed = {
        name: pack(values.cpu(), p.TYPES[program.registers[name].type][0]) for name, values in program.constants.items()
    }
    return _safetensors().save(packed, {_KEY: sealed(plain(program), packed)})


def load_program(path: str | Path) -> p.IntegerProgram:
    """Read a program and check it, so that a file from anywhere gives a valid program or is refused.

    Raises:
        CheckpointError: the file is missing, truncated, altered, of another format, or not a valid program; the message
            names the file.
    """
    safetensors, path = _safetensors(), Path(path)
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is missing; give the file that a program was saved to")
    try:
        text, packed = _read(path, safetensors)
        values = parse_json(text, CheckpointError)
        _check_format(values)
        said = values.pop("sha256", None)
        if said != _digest(text, packed) or not text.endswith(f'"sha256":"{said}"}}'):
            raise CheckpointError("it was altered since it was saved, its sha256 differs; copy it again")
        program = _program(values, packed)
        check_program(program)
    except (CheckpointError, LoweringError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return program


def _read(path: Path, safetensors: Any) -> tuple[str, dict[str, Tensor]]:
    """The JSON text and the tensors of a file."""
    content = read_file(path, _LARGEST, CheckpointError)
    length = int.from_bytes(content[:8], "little")
    if not 0 < length <= min(_LONGEST_HEADER, len(content) - 8):
        raise CheckpointError("it is not a saved program, or was truncated; copy it again")
    try:
        packed = safetensors.load(content)
    except Exception as error:  # safetensors' own errors, and torch's for dtypes that it lacks
        raise CheckpointError(f"it is not a saved program: {' '.join(str(error).split())[:200]}") from error
    if any(each.dtype is not torch.uint8 or each.ndim != 1 for each in packed.values()):
        raise CheckpointError("it is not a saved program: it has tensors that are no bytes")
    header = parse_json(content[8 : 8 + length], CheckpointError).get("__metadata__", {})
    if _KEY not in header:
        raise CheckpointError("it is not a saved program: it holds tensors only")
    return header[_KEY], packed


def _check_format(values: Any) -> None:
    if not isinstance(values, dict) or type(values.get("format")) is not int:
        raise CheckpointError("it is not a saved program: it has no format number")
    if values["format"] > FORMAT:
        raise CheckpointError(f"it has format {values['format']}, newer than {FORMAT}: update vitquant")
    if values["format"] < FORMAT:
        raise CheckpointError(f"it has format {values['format']}, older than {FORMAT}: lower its model again")


def sealed(values: Mapping[str, Any], packed: Mapping[str, Tensor]) -> str:
    """The JSON text of a file, which ends in the digest of the text before it and of the constants' bytes.

    Arguments:
        values: from `plain`.
        packed: uint8, the packed bytes of each constant, by its name.
    """
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    text = f'{text[:-1]},"sha256":"{"0" * 64}"}}'
    return f'{text[:-_AFTER]}{_digest(text, packed)}"}}'


def _digest(text: str, packed: Mapping[str, Tensor]) -> str:
    """The sha256 of the JSON text before the digest's digits, and of the constants' bytes in order of their names."""
    found = hashlib.sha256(text[:-_AFTER].encode())
    for name in sorted(packed):
        found.update(packed[name].numpy().data)
    return found.hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError("programs are saved by safetensors: pip install 'vitquant[checkpoint]'") from error
    return safetensors.torch


def plain(program: p.IntegerProgram) -> dict[str, Any]:
    """A program as the plain values of its file's JSON, without the constants' values and the digest."""
    facts = dict(program.facts)
    said = facts.pop("outputs", {})
    return {
        "format": FORMAT,
        "inputs": [{"register": program.input, **facts.pop("input", {})}],
        "outputs": [{"name": name, "register": each, **said.get(name, {})} for name, each in program.outputs.items()],
        "registers": {name: [each.type, list(each.shape)] for name, each in program.registers.items()},
        "instructions": [_plain_instruction(each) for each in program.instructions],
        "codes": dict(program.codes),
        "facts": facts,
    }


def _plain_instruction(i: p.Instruction) -> dict[str, Any]:
    arguments = {each.key: each.of(i) for each in form_of(i).arguments}
    return {"op": opcode_of(i), "site": i.site, "output": i.output, **arguments}


# Reading: everything that is read is checked.

_NAME = Text(10_000)  # `check_program` checks the names of registers
_SCALE = Number()  # and scales and zero points
_SCHEMA = Table(
    {
        "format": Integer(FORMAT, FORMAT),
        "inputs": ListOf(
            Table({"register": _NAME}, {"scale": _SCALE, "zero_point": Integer(), "low": Integer(), "high": Integer()}),
            1,
            1,
        ),
        "outputs": ListOf(
            Table({"name": _NAME, "register": _NAME}, {"scale": ListOf(_SCALE), "zero_point": Integer()}), 1
        ),
        "registers": TableOf(Row((_NAME, ListOf(Integer(), most=64))), _NAME),
        "instructions": ListOf(TableOf(Plain())),
        "codes": TableOf(_NAME, _NAME),
        "facts": TableOf(Plain()),
    }
)


def _schema_of(role: opcodes.Role) -> Schema:
    """The schema of an argument in a file; `check_program` checks names and numbers further."""
    match role:
        case opcodes.Read(several):
            return ListOf(Text()) if several else Text()
        case opcodes.Constant(_, optional, several):
            one = maybe(Text()) if optional else Text()
            return ListOf(one) if several else one
        case opcodes.Number(_, _, several):
            return ListOf(Integer()) if several else Integer()
        case opcodes.Flag():
            return Flag()
        case _:
            assert_never(role)


_INSTRUCTIONS = {
    opcode: Table(
        {"op": Text(), "site": Text(), "output": Text()}
        | {each.key: _schema_of(each.role) for each in form(opcode).arguments}
    )
    for opcode in opcodes.OPCODES
}


def _program(values: Mapping[str, Any], packed: Mapping[str, Tensor]) -> p.IntegerProgram:
    check(values, _SCHEMA, CheckpointError)
    registers = {name: p.Register(kind, tuple(shape)) for name, (kind, shape) in values["registers"].items()}
    for name, register in registers.items():
        check_register(name, register)
    given, results = dict(values["inputs"][0]), {each["name"]: dict(each) for each in values["outputs"]}
    facts = dict(values["facts"])
    if twice := [name for name in ("input", "outputs") if name in facts]:
        raise CheckpointError(f"facts: {twice[0]!r} is what inputs and outputs say; name it otherwise")
    if len(results) < len(values["outputs"]):
        raise CheckpointError("outputs: two of them have one name")
    program = p.IntegerProgram(
        input=given.pop("register"),
        outputs={each.pop("name"): each.pop("register") for each in results.values()},
        registers=registers,
        constants={name: _constant(name, registers, packed[name]) for name in sorted(packed)},
        instructions=tuple(_instruction(n, each) for n, each in enumerate(values["instructions"])),
        codes=values["codes"],
    )
    # JSON may write 1.0 as 1.
    if "scale" in given:
        given["scale"] = float(given["scale"])
    for result in results.values():
        if "scale" in result:
            result["scale"] = [float(each) for each in result["scale"]]
    said = {name: result for name, result in results.items() if result}
    ends = {name: facts for name, facts in (("input", given), ("outputs", said)) if facts}
    return replace(program, facts={**ends, **facts})


def _constant(name: str, registers: Mapping[str, p.Register], packed: Tensor) -> Tensor:
    """A constant as int64, after checking that its size fits its register."""
    if name not in registers:
        raise CheckpointError(f"constant {shown(name)} has no register")
    register = registers[name]
    bits, signed = p.TYPES[register.type]
    if min(register.shape, default=1) < 1 or packed_size(prod(register.shape), bits) != packed.numel():
        raise CheckpointError(f"constant {shown(name)} does not have the bytes of its type and shape")
    return unpack(packed, bits, signed, register.shape).to(torch.int64)


def _instruction(number: int, value: Mapping[str, Any]) -> p.Instruction:
    place = f"instructions[{number}]"
    opcode = take(value, "op", Text(among=opcodes.OPCODES), CheckpointError, place)
    check(value, _INSTRUCTIONS[opcode], CheckpointError, place)
    found = form(opcode)
    given: dict[str, Any] = {each.field or each.key: value[each.key] for each in found.arguments}
    given = {field: tuple(each) if isinstance(each, list) else each for field, each in given.items()}
    return found.kind(output=value["output"], site=value["site"], **given)

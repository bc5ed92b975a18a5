"""An integer program as one file: safetensors, with the constants packed and the program as JSON in its metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from vitquant.errors import CheckpointError, LoweringError
from vitquant.files import write_file
from vitquant.packing import pack, packed_size, unpack
from vitquant.parsing import parse_json, read_file
from vitquant.program import instructions as p
from vitquant.program.checking import check_program, check_register
from vitquant.schema import Integer, ListOf, Plain, Row, Table, TableOf, Text, check, of_type, shown, take

FORMAT = 2
_KEY = "vitquant_program"  # one key, as several would be written in any order
_LARGEST = 2**36  # bytes; constants are held once packed and once in 64 bits
_LONGEST_HEADER = 2**23  # bytes; that of a DeiT has 2**18


def save_program(program: p.IntegerProgram, path: str | Path, force: bool = False) -> None:
    """Write a program to one file; the same program gives the same bytes.

    Arguments:
        program: what `lower` returned.
        path: of the file; its folder is made when missing.
        force: replace a file that is there.

    Raises:
        LoweringError: the program is not valid.
        ExportError: the file cannot be written.
        CheckpointError: safetensors is not installed.
    """
    check_program(program)
    packed = {
        name: pack(values.cpu(), p.TYPES[program.registers[name].type][0]) for name, values in program.constants.items()
    }
    text = _text({**_plain(program), "sha256": _digest(_plain(program), packed)})
    write_file(Path(path), _safetensors().save(packed, {_KEY: text}), force)


def load_program(path: str | Path) -> p.IntegerProgram:
    """Read a program, whoever wrote the file: it is valid or refused.

    Raises:
        CheckpointError: missing, truncated, altered, of a newer format, or no valid program; the message names the
            file.
    """
    safetensors, path = _safetensors(), Path(path)
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is missing; give the file that a program was saved to")
    try:
        values, packed = _read(path, safetensors)
        _check_format(values)
        if values.pop("sha256", None) != _digest(values, packed):
            raise CheckpointError("it was altered since it was saved, its sha256 differs; copy it again")
        program = _program(values, packed)
        check_program(program)
    except (CheckpointError, LoweringError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return program


def _read(path: Path, safetensors: Any) -> tuple[Any, dict[str, Tensor]]:
    """The JSON and the tensors of a file."""
    content = read_file(path, _LARGEST, CheckpointError)
    length = int.from_bytes(content[:8], "little")
    if not 0 < length <= min(_LONGEST_HEADER, len(content) - 8):
        raise CheckpointError("it is no saved program, or was truncated; copy it again")
    try:
        packed = safetensors.load(content)
    except Exception as error:  # the parser's own, and what torch makes of types that it has not
        raise CheckpointError(f"it is no saved program: {' '.join(str(error).split())[:200]}") from error
    if any(each.dtype is not torch.uint8 or each.ndim != 1 for each in packed.values()):
        raise CheckpointError("it is no saved program: it has tensors that are no bytes")
    header = parse_json(content[8 : 8 + length], CheckpointError).get("__metadata__", {})
    if _KEY not in header:
        raise CheckpointError("it is no saved program: it holds tensors only")
    return parse_json(header[_KEY], CheckpointError), packed


def _check_format(values: Any) -> None:
    if not isinstance(values, dict) or type(values.get("format")) is not int:
        raise CheckpointError("it is no saved program: it has no format number")
    if values["format"] > FORMAT:
        raise CheckpointError(f"it has format {values['format']}, newer than {FORMAT}: update vitquant")
    if values["format"] < FORMAT:
        raise CheckpointError(f"it has format {values['format']}, older than {FORMAT}: lower its model again")


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(values: Mapping[str, Any], packed: Mapping[str, Tensor]) -> str:
    """The sha256 of the JSON and of the constants' bytes, in order of their names."""
    found = hashlib.sha256(_text(values).encode())
    for name in sorted(packed):
        found.update(packed[name].numpy().data)
    return found.hexdigest()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError("programs are saved by safetensors: pip install 'vitquant[checkpoint]'") from error
    return safetensors.torch


def _plain(program: p.IntegerProgram) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "input": program.input,
        "output": program.output,
        "registers": {name: [each.type, list(each.shape)] for name, each in program.registers.items()},
        "instructions": [{"kind": type(each).__name__, **vars(each)} for each in program.instructions],
        "codes": dict(program.codes),
        "facts": dict(program.facts),
    }


# And back: nothing that was read is taken for what it should be.

_NAME = Text(10_000)  # `check_program` says which names registers may have
_KINDS = {kind.__name__: kind for kind in p.INSTRUCTIONS}
_INSTRUCTIONS = {
    name: Table({"kind": _NAME, **{field: of_type(hint) for field, hint in get_type_hints(kind).items()}})
    for name, kind in _KINDS.items()
}
_SCHEMA = Table(
    {
        "format": Integer(FORMAT, FORMAT),
        "input": _NAME,
        "output": _NAME,
        "registers": TableOf(Row((_NAME, ListOf(Integer(), most=64))), _NAME),
        "instructions": ListOf(TableOf(Plain())),
        "codes": TableOf(_NAME, _NAME),
        "facts": TableOf(Plain()),
    }
)


def _program(values: Mapping[str, Any], packed: Mapping[str, Tensor]) -> p.IntegerProgram:
    check(values, _SCHEMA, CheckpointError)
    registers = {name: p.Register(kind, tuple(shape)) for name, (kind, shape) in values["registers"].items()}
    for name, register in registers.items():
        check_register(name, register)
    return p.IntegerProgram(
        input=values["input"],
        output=values["output"],
        registers=registers,
        constants={name: _constant(name, registers, packed[name]) for name in sorted(packed)},
        instructions=tuple(_instruction(n, each) for n, each in enumerate(values["instructions"])),
        codes=values["codes"],
        facts=values["facts"],
    )


def _constant(name: str, registers: Mapping[str, p.Register], packed: Tensor) -> Tensor:
    """A constant as int64, when it has as many bytes as its register says."""
    if name not in registers:
        raise CheckpointError(f"constant {shown(name)} has no register")
    register = registers[name]
    bits, signed = p.TYPES[register.type]
    if min(register.shape, default=1) < 1 or packed_size(prod(register.shape), bits) != packed.numel():
        raise CheckpointError(f"constant {shown(name)} has not the bytes of its type and shape")
    return unpack(packed, bits, signed, register.shape).to(torch.int64)


def _instruction(number: int, value: Mapping[str, Any]) -> p.Instruction:
    place = f"instructions[{number}]"
    kind = take(value, "kind", Text(among=tuple(_KINDS)), CheckpointError, place)
    check(value, _INSTRUCTIONS[kind], CheckpointError, place)
    fields_of = {field: each for field, each in value.items() if field != "kind"}
    given: dict[str, Any] = {
        field: tuple(each) if isinstance(each, list) else each for field, each in fields_of.items()
    }
    return _KINDS[kind](**given)

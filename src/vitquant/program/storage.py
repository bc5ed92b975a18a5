"""An integer program as one file: safetensors, with the constants packed and the program as JSON in its metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from vitquant.errors import CheckpointError, LoweringError
from vitquant.files import write_file
from vitquant.packing import pack, packed_size, unpack
from vitquant.program import instructions as p
from vitquant.program.checking import check_program, check_register

FORMAT = 2
_KEY = "vitquant_program"  # one key, as several would be written in any order
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
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; give the file that a program was saved to")
    try:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        if not 0 < length <= min(_LONGEST_HEADER, len(content) - 8):
            raise CheckpointError(f"{path} is no saved program, or was truncated; copy it again")
        packed = safetensors.load(content)
        if any(each.dtype is not torch.uint8 or each.ndim != 1 for each in packed.values()):
            raise CheckpointError(f"{path} is no saved program: it has tensors that are no bytes")
        values = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_KEY])
    except CheckpointError:
        raise
    except Exception as error:  # what a damaged file makes of two parsers
        reason = str(error).splitlines()[:1]
        raise CheckpointError(f"{path} is no saved program: {reason[0] if reason else type(error).__name__}") from error
    if not isinstance(values, dict) or type(values.get("format")) is not int:
        raise CheckpointError(f"{path} is no saved program: it has no format number")
    if values["format"] > FORMAT:
        raise CheckpointError(f"{path} has format {values['format']}, newer than {FORMAT}: update vitquant")
    if values["format"] < FORMAT:
        raise CheckpointError(f"{path} has format {values['format']}, older than {FORMAT}: lower its model again")
    try:
        if values.pop("sha256", None) != _digest(values, packed):
            raise _DamageError("it was altered since it was saved, its sha256 differs; copy it again")
        program = _program(values, packed)
        check_program(program)
    except (_DamageError, LoweringError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (RecursionError, ValueError) as error:  # nested deeper than Python follows, or no numbers
        raise CheckpointError(f"{path} is no saved program: it has values that no program has") from error
    return program


class _DamageError(Exception):
    """The JSON is not that of a program; the message says where."""


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

_KINDS = {kind.__name__: kind for kind in p.INSTRUCTIONS}
_LARGEST_INTEGER = 2**63 - 1


def _program(values: Mapping[str, Any], packed: Mapping[str, Tensor]) -> p.IntegerProgram:
    expected = {"format", *(field.name for field in fields(p.IntegerProgram))} - {"constants"}
    if values.keys() != expected or values["format"] != FORMAT:
        raise _DamageError(f"its keys are not {', '.join(sorted(expected))} of format {FORMAT}")
    registers = {name: _register(name, each) for name, each in _typed(values["registers"], dict, "registers").items()}
    return p.IntegerProgram(
        input=_typed(values["input"], str, "input"),
        output=_typed(values["output"], str, "output"),
        registers=registers,
        constants={name: _constant(name, registers, packed[name]) for name in sorted(packed)},
        instructions=tuple(_instruction(each) for each in _typed(values["instructions"], list, "instructions")),
        codes={name: _typed(each, str, "codes") for name, each in _typed(values["codes"], dict, "codes").items()},
        facts=_typed(values["facts"], dict, "facts"),
    )


def _register(name: str, value: Any) -> p.Register:
    match value:
        case [str(kind), shape]:
            register = p.Register(kind, _typed(shape, tuple[int, ...], name[:80]))
            check_register(name, register)
            return register
        case _:
            raise _DamageError(f"register {name[:80]!r} has no type and shape")


def _constant(name: str, registers: Mapping[str, p.Register], packed: Tensor) -> Tensor:
    """A constant as int64, when it has as many bytes as its register says."""
    if name not in registers:
        raise _DamageError(f"constant {name[:80]!r} has no register")
    register = registers[name]
    bits, signed = p.TYPES[register.type]
    if min(register.shape, default=1) < 1 or packed_size(prod(register.shape), bits) != packed.numel():
        raise _DamageError(f"constant {name[:80]!r} has not the bytes of its type and shape")
    return unpack(packed, bits, signed, register.shape).to(torch.int64)


def _instruction(value: Any) -> p.Instruction:
    match value:
        case {"kind": str(name), **given} if name in _KINDS:
            kind = _KINDS[name]
        case _:
            raise _DamageError(f"{str(value)[:80]!r} is no instruction")
    hints = get_type_hints(kind)
    if given.keys() != hints.keys():
        raise _DamageError(f"a {name} has not the fields {', '.join(hints)}")
    return kind(**{field: _typed(given[field], hint, f"{name}.{field}") for field, hint in hints.items()})


def _typed(value: Any, hint: Any, where: str) -> Any:
    """The value, when it is of the type that a field is declared with; a list becomes a tuple."""
    match hint, value:
        case _ if hint in (str, bool, dict, list) and type(value) is hint:
            return value
        case _ if hint is int and type(value) is int and abs(value) <= _LARGEST_INTEGER:
            return value
        case _ if type(None) in get_args(hint):
            return None if value is None else _typed(value, get_args(hint)[0], where)
        case _ if get_args(hint)[1:] == (...,) and type(value) is list:
            return tuple(_typed(each, get_args(hint)[0], where) for each in value)
        case _:
            raise _DamageError(f"{where} is {str(value)[:80]!r}, not {getattr(hint, '__name__', hint)}")

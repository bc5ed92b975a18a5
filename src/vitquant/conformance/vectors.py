"""All vectors, and writing them to a directory: docs/program-format.md, section "Conformance vectors"."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vitquant.conformance.block import block
from vitquant.conformance.codes import operations_on_codes
from vitquant.conformance.drafting import Vector
from vitquant.conformance.moving import moves
from vitquant.conformance.rescaling import rescalings
from vitquant.conformance.sums import sums
from vitquant.errors import CheckpointError, ExportError
from vitquant.files import Directory, replacing
from vitquant.files.refusal import told_as
from vitquant.program.instructions import IntegerProgram
from vitquant.program.opcodes import Constant, Flag, form_of, opcode_of
from vitquant.program.storage import FORMAT as PROGRAM_FORMAT
from vitquant.program.storage import to_bytes
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.on_images import quantization_of
from vitquant.runtime.outputs import named
from vitquant.runtime.products import exact_int64

FORMAT = 1
INDEX = "index.json"


def all_vectors() -> tuple[Vector, ...]:
    """Every vector, in the order of the index."""
    return (*sums(), *rescalings(), *operations_on_codes(), *moves(), block())


def values_of(vector: Vector) -> dict[str, Tensor]:
    """The values that an engine must reproduce: each register that is not constant, by name, for the vector's input.

    Registers are int64. If the program has scales and zero points, there are also `images`, and each output in float32
    as `outputs/NAME`.
    """
    held = {vector.program.input: vector.codes}
    taps = {each.output: lambda x, name=each.output: held.__setitem__(name, x) for each in vector.program.instructions}
    codes = named(Interpreter(vector.program, exact_int64)(vector.codes, taps), vector.program.outputs)
    if vector.images is not None:
        _, outputs = quantization_of(vector.program)
        held["images"] = vector.images
        held |= {f"outputs/{name}": outputs[name].decode(each) for name, each in codes.items()}
    return {name: values.contiguous() for name, values in held.items()}


def covered(program: IntegerProgram) -> dict[str, list[str]]:
    """The features of the format that a program uses: opcodes, types, and values of optional and boolean arguments."""
    found: dict[str, set[str]] = {"opcodes": set(), "types": {each.type for each in program.registers.values()}}
    found["arguments"] = set()
    for i in program.instructions:
        opcode = opcode_of(i)
        found["opcodes"].add(opcode)
        for argument in form_of(i).arguments:
            match argument.role, argument.of(i):
                case Constant(optional=True), value:
                    found["arguments"].add(f"{opcode}.{argument.key} {'absent' if value is None else 'present'}")
                case Flag(), value:
                    found["arguments"].add(f"{opcode}.{argument.key} {str(value).lower()}")
                case _:
                    pass
    return {name: sorted(words) for name, words in found.items()}


def write_vectors(path: str | Path, force: bool = False) -> None:
    """Write a directory with all vectors; the same vitquant writes the same bytes.

    Arguments:
        path: of the directory; created when missing.
        force: replace existing vectors.

    Raises:
        ExportError: it cannot be written; see `vitquant.files.replacing`.
        CheckpointError: safetensors is not installed.
    """
    vectors = all_vectors()
    with replacing(path, force, directory_of(vectors)) as new:
        write_into(new, vectors)


def directory_of(vectors: Iterable[Vector]) -> Directory:
    """The kind of directory that `write_into` writes."""
    names = [INDEX, *(name for vector in vectors for name in _files(vector.name))]
    return Directory("directory of conformance vectors", dict.fromkeys(names), lambda path: (path / INDEX).is_file())


def write_into(directory: Path, vectors: Sequence[Vector]) -> None:
    """Write vectors into a directory that does not exist yet."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise CheckpointError("vectors are safetensors: pip install 'vitquant[checkpoint]'") from error
    with told_as(ExportError, f"{directory} could not be written"):
        directory.mkdir()
        for vector in vectors:
            program, tensors = (directory / name for name in _files(vector.name))
            program.write_bytes(to_bytes(vector.program))
            tensors.write_bytes(save(values_of(vector)))
        text = json.dumps(index(vectors), indent=1)
        (directory / INDEX).write_text(f"{text}\n", encoding="utf-8")


def index(vectors: Iterable[Vector]) -> dict[str, Any]:
    """The content of the index: for each vector its files, its description and the features that it covers."""
    entries = []
    for vector in vectors:
        program, tensors = _files(vector.name)
        about = {"name": vector.name, "about": vector.about, "program": program, "tensors": tensors}
        entries.append({**about, "covers": covered(vector.program)})
    return {"format": FORMAT, "program_format": PROGRAM_FORMAT, "vectors": entries}


def _files(name: str) -> tuple[str, str]:
    return f"{name}.program", f"{name}.safetensors"

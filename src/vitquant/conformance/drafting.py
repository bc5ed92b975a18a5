"""Helpers to write vectors: reproducible pseudo-random numbers, and a builder of programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from vitquant.program import instructions as p
from vitquant.program.shapes import Shape, written_shape

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


@dataclass(frozen=True)
class Vector:
    """A program and its input.

    Arguments:
        name: the stem of its files.
        about: what it tests, in a sentence.
        program: a valid program.
        codes: int64, the codes of its input.
        images: float32, the images with these codes; None if the program has no scale and zero point of its input.
    """

    name: str
    about: str
    program: p.IntegerProgram
    codes: Tensor
    images: Tensor | None = None


def noise(seed: int, low: int, high: int, *shape: int) -> Tensor:
    """Pseudo-random integers from low to high: int64, the same on every machine and with every library.

    Source: Steele, Lea and Flood 2014, SplitMix64.
    """
    state, found = seed, []
    for _ in range(prod(shape)):
        state = (state + _STEP) & _MASK
        mixed = ((state ^ (state >> 30)) * _FIRST) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * _SECOND) & _MASK
        found.append(low + (mixed ^ (mixed >> 31)) % (high - low + 1))
    return torch.tensor(found, dtype=torch.int64).view(shape)


def codes_between(low: int, high: int, *shape: int) -> Tensor:
    """Four inputs of a shape: the smallest code everywhere, the largest, both alternating, and noise."""
    ends = torch.tensor([low, high]).repeat(prod(shape))[: prod(shape)].view(shape)
    lowest, highest = torch.full(shape, low), torch.full(shape, high)
    return torch.stack([lowest, highest, ends, noise(prod(shape), low, high, *shape)])


class Draft:
    """A builder of a program.

    Arguments:
        type, shape: of the input register `x`; the shape is without the batch.
    """

    def __init__(self, type: str, *shape: int) -> None:
        self.registers = {"x": p.Register(type, (-1, *shape))}
        self.shapes: dict[str, Shape] = {"x": (-1, *shape)}
        self.constants: dict[str, Tensor] = {}
        self.instructions: list[p.Instruction] = []

    def constant(self, type: str, values: Tensor | Sequence[Any] | int) -> str:
        """Add a constant, and return its name."""
        name, held = f"c{len(self.constants)}", torch.as_tensor(values, dtype=torch.int64)
        self.constants[name], self.registers[name] = held, p.Register(type, tuple(held.shape))
        self.shapes[name] = tuple(held.shape)
        return name

    def noisy(self, type: str, *shape: int, seed: int = 1) -> str:
        """Add a constant of noise over the range of a type, with both ends if it has two elements."""
        low, high = p.type_limits(type)
        values = noise(seed, low, high, *shape).flatten()
        if len(values) > 1:
            values[0], values[-1] = low, high
        return self.constant(type, values.view(shape))

    def emit(self, kind: type[p.Instruction], type: str, **given: Any) -> str:
        """Add an instruction, and return the name of the register that it writes."""
        output = f"r{len(self.instructions)}"
        instruction = kind(output=output, site=f"site{len(self.instructions)}", **given)
        self.shapes[output] = shape = written_shape(instruction, self.shapes)
        self.registers[output] = p.Register(type, tuple(max(size, -1) for size in shape))
        self.instructions.append(instruction)
        return output

    def program(self, outputs: dict[str, str] | None = None, **given: Any) -> p.IntegerProgram:
        """The program so far.

        Arguments:
            outputs: the output registers by name; the last register when None.
            given: the fields `codes` and `facts` of the program.
        """
        outputs = outputs or {"output": self.instructions[-1].output}
        return p.IntegerProgram("x", outputs, self.registers, self.constants, tuple(self.instructions), **given)

    def vector(self, name: str, about: str, codes: Tensor | None = None) -> Vector:
        """The program so far as a vector, with the given codes or those of `codes_between` for the input's type."""
        first = self.registers["x"]
        return Vector(
            name, about, self.program(), codes_between(*first.limits, *first.shape[1:]) if codes is None else codes
        )

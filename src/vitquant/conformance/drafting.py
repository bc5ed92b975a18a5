"""What vectors are made of: numbers that are the same everywhere, and programs written line by line."""

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
    """A program and what to feed it.

    Arguments:
        name: of its files.
        about: what it is for, in a sentence.
        program: a valid one.
        codes: int64, of its input.
        images: float32, whose codes these are; None where the program does not say what codes stand for.
    """

    name: str
    about: str
    program: p.IntegerProgram
    codes: Tensor
    images: Tensor | None = None


def noise(seed: int, low: int, high: int, *shape: int) -> Tensor:
    """Integers from low to high that look random: int64, the same on every machine and with every library.

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
    """Four inputs of a shape: all the smallest, all the largest, both in turns, and noise."""
    ends = torch.tensor([low, high]).repeat(prod(shape))[: prod(shape)].view(shape)
    lowest, highest = torch.full(shape, low), torch.full(shape, high)
    return torch.stack([lowest, highest, ends, noise(prod(shape), low, high, *shape)])


class Draft:
    """A program while it is written.

    Arguments:
        type, shape: of the register `x` that it is given; without the batch.
    """

    def __init__(self, type: str, *shape: int) -> None:
        self.registers = {"x": p.Register(type, (-1, *shape))}
        self.shapes: dict[str, Shape] = {"x": (-1, *shape)}
        self.constants: dict[str, Tensor] = {}
        self.instructions: list[p.Instruction] = []

    def constant(self, type: str, values: Tensor | Sequence[Any] | int) -> str:
        """Keep a constant, and return its name."""
        name, held = f"c{len(self.constants)}", torch.as_tensor(values, dtype=torch.int64)
        self.constants[name], self.registers[name] = held, p.Register(type, tuple(held.shape))
        self.shapes[name] = tuple(held.shape)
        return name

    def noisy(self, type: str, *shape: int, seed: int = 1) -> str:
        """A constant of noise over all of a type, its two ends among it where there is room."""
        low, high = p.type_limits(type)
        values = noise(seed, low, high, *shape).flatten()
        if len(values) > 1:
            values[0], values[-1] = low, high
        return self.constant(type, values.view(shape))

    def emit(self, kind: type[p.Instruction], type: str, **given: Any) -> str:
        """Write an instruction, and return the name of the register that it writes."""
        output = f"r{len(self.instructions)}"
        instruction = kind(output=output, site=f"site{len(self.instructions)}", **given)
        self.shapes[output] = shape = written_shape(instruction, self.shapes)
        self.registers[output] = p.Register(type, tuple(max(size, -1) for size in shape))
        self.instructions.append(instruction)
        return output

    def program(self, outputs: dict[str, str] | None = None, **given: Any) -> p.IntegerProgram:
        """What was written.

        Arguments:
            outputs: registers by name; what was written last when None.
            given: fields of the program, `codes` and `facts`.
        """
        outputs = outputs or {"output": self.instructions[-1].output}
        return p.IntegerProgram("x", outputs, self.registers, self.constants, tuple(self.instructions), **given)

    def vector(self, name: str, about: str, codes: Tensor | None = None) -> Vector:
        """What was written, with codes of every kind that the input's type has unless some are given."""
        first = self.registers["x"]
        return Vector(
            name, about, self.program(), codes_between(*first.limits, *first.shape[1:]) if codes is None else codes
        )

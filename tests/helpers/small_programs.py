"""Programs of a few instructions, for tests of what checks and runs them."""

from __future__ import annotations

import torch

from vitquant.integer.exponential import exact_exponential
from vitquant.program import instructions as p

TABLE = exact_exponential(0.05)
POWERS = torch.tensor([1 << (14 - code) for code in range(15)] + [0])


def program(*steps: p.Instruction, registers: dict[str, p.Register], constants: dict[str, torch.Tensor]):
    """From codes u8 (-1, 4, 6) to the last step's output."""
    types = {name: p.Register("s32", tuple(values.shape)) for name, values in constants.items()}
    given = {"x": p.Register("u8", (-1, 4, 6)), **types, **registers}
    return p.IntegerProgram("x", steps[-1].output, given, constants, steps)


def one(step: p.Instruction, written: p.Register, shape=(-1, 4, 6), kind="u8", **constants: torch.Tensor):
    """A program of one instruction."""
    registers = {"x": p.Register(kind, shape), step.output: written}
    return program(step, registers=registers, constants=constants)

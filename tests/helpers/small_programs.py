"""Programs of a few instructions, for tests of what checks and runs them."""

from __future__ import annotations

from dataclasses import replace

import torch

from vitquant.integer.exponential import exact_exponential
from vitquant.program import instructions as p

TABLE = exact_exponential(0.05)
POWERS = torch.tensor([1 << (14 - code) for code in range(15)] + [0])


def program(*steps: p.Instruction, registers: dict[str, p.Register], constants: dict[str, torch.Tensor]):
    """From codes u8 (-1, 4, 6) to the last step's output."""
    types = {name: p.Register("s32", tuple(values.shape)) for name, values in constants.items()}
    given = {"x": p.Register("u8", (-1, 4, 6)), **types, **registers}
    return p.IntegerProgram("x", {"output": steps[-1].output}, given, constants, steps)


def one(step: p.Instruction, written: p.Register, shape=(-1, 4, 6), kind="u8", **constants: torch.Tensor):
    """A program of one instruction."""
    registers = {"x": p.Register(kind, shape), step.output: written}
    return program(step, registers=registers, constants=constants)


def everything() -> p.IntegerProgram:
    """A small attention: a LayerNorm, a product of codes, a masked softmax, its context, a table, a mean."""
    constants = {
        "factors": torch.tensor([0, 1, 2, 3, 0, 1]), "gain": torch.full((6,), 2**20), "shift": torch.full((6,), 2**37),
        "weight": torch.arange(-15, 15).view(5, 6), "weight_zero": torch.full((5, 1), 3), "bias": torch.arange(5) * 100,
        "m": torch.tensor(2**20), "half": torch.tensor(2**20), "values": TABLE.values, "octaves": TABLE.octaves,
        "mask": torch.eye(4, dtype=torch.int64), "powers": POWERS, "square": torch.arange(256) // 2,
    }  # fmt: skip
    types = {
        "n": "u8 -1 4 6", "a": "s32 -1 4 5", "q": "u8 -1 4 5", "k": "u8 -1 5 4", "s": "s32 -1 4 4", "c": "u8 -1 4 4",
        "l": "u4 -1 4 4", "o": "u16 -1 4 4", "v": "s32 -1 4 5", "w": "u8 -1 4 5", "g": "u8 -1 4 5", "t": "s32 -1 5",
        "y": "s8 -1 5", "gain": "s32 6", "shift": "s64 6", "factors": "u8 6", "weight": "s8 5 6", "half": "s64",
        "weight_zero": "s8 5 1", "values": "u16 257", "octaves": "s32 257", "mask": "u8 4 4", "powers": "u16 16",
        "square": "u8 256",
    }  # fmt: skip
    registers = {name: p.Register(type.split()[0], tuple(map(int, type.split()[1:]))) for name, type in types.items()}
    steps = (
        p.LayerNorm("n", "norm", "x", "factors", 7, 5, 248 * 8, "gain", "shift", 30, 0, 255),
        p.Linear("a", "linear", "n", "weight", "bias", 9, "weight_zero"),
        p.Requantize("q", "query", ("a",), ("m",), "half", 28, 0, 255),
        p.Permute("k", "query", "q", (0, 2, 1)),
        p.Product("s", "scores", "q", "k", 3, 4),
        p.Requantize("c", "scores", ("s",), ("m",), "half", 27, 0, 255),
        p.SoftmaxToPowers("l", "softmax", "c", "mask", "values", "octaves", 15, 1, 0, False),
        p.Lookup("o", "softmax", "l", "powers", 0),
        p.Product("v", "context", "o", "q", 0, 5),
        p.Requantize("w", "context", ("v",), ("m",), "half", 34, 0, 255),
        p.Lookup("g", "activation", "w", "square", 0),
        p.Sum("t", "mean", "g", (1,), False, 2),
        p.Requantize("y", "logits", ("t",), ("m",), "half", 18, -128, 127),
    )
    made = program(*steps, registers=registers, constants=constants)
    ends = {"scale": 0.1, "zero_point": 3, "low": 0, "high": 255}
    facts = {"input": ends, "outputs": {"output": {"scale": [0.2], "zero_point": 0}}}
    return replace(made, codes={"norm:input": "x"}, facts=facts)

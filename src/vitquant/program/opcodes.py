"""The names of operations and arguments in files, which are stable and independent of the names in Python.

docs/program-format.md is the specification. Names here are never changed or reused for something else; what an
instruction computes changes only with `storage.FORMAT`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never, get_args

from vitquant.integer.softmax import LARGEST_OFFSET
from vitquant.program import instructions as p

Opcode = Literal[
    "linear", "convolution", "product", "multiply", "requantize", "softmax_to_powers", "softmax_to_levels",
    "layer_norm", "rms_norm", "lookup", "sum", "reshape", "permute", "slice", "roll", "pad", "concat",
]  # fmt: skip
OPCODES: tuple[Opcode, ...] = get_args(Opcode)

LARGEST_RANK = 16


@dataclass(frozen=True)
class Read:
    """A register or a constant; a list of them when `several`."""

    several: bool = False


@dataclass(frozen=True)
class Constant:
    """A constant, of a certain type where one is named.

    Arguments:
        type: one of `instructions.TYPES`; empty for any.
        optional: whether it may be null.
        several: whether it is a list of constants.
    """

    type: str = ""
    optional: bool = False
    several: bool = False


@dataclass(frozen=True)
class Number:
    """An integer from `low` to `high`; a list of them when `several`."""

    low: int = -(2**62)
    high: int = 2**62
    several: bool = False


@dataclass(frozen=True)
class Flag:
    """True or false."""


Role = Read | Constant | Number | Flag


@dataclass(frozen=True)
class Argument:
    """One argument of an instruction.

    Arguments:
        key: its name in files.
        role: what kind of argument it is, with restrictions.
        field: its name in the class; empty if that is the key.
    """

    key: str
    role: Role
    field: str = ""

    def of(self, instruction: p.Instruction) -> str | int | tuple[str, ...] | tuple[int, ...] | None:
        """The argument's value in an instruction."""
        return getattr(instruction, self.field or self.key)

    def values(self, instruction: p.Instruction) -> tuple[str | int, ...]:
        """The argument's values: one, or all of a list; empty for null."""
        value = self.of(instruction)
        return value if isinstance(value, tuple) else () if value is None else (value,)


@dataclass(frozen=True)
class Form:
    """How an instruction is stored in a file: by these arguments, beside `op`, `site` and `output`.

    Arguments:
        kind: the class of the instruction.
        arguments: in the order of the text form.
    """

    kind: type[p.Instruction]
    arguments: tuple[Argument, ...]


def opcode_of(instruction: p.Instruction) -> Opcode:
    """The opcode of an instruction."""
    match instruction:
        case p.Linear():
            return "linear"
        case p.Convolution():
            return "convolution"
        case p.Product():
            return "product"
        case p.Multiply():
            return "multiply"
        case p.Requantize():
            return "requantize"
        case p.SoftmaxToPowers():
            return "softmax_to_powers"
        case p.SoftmaxToLevels():
            return "softmax_to_levels"
        case p.LayerNorm():
            return "layer_norm"
        case p.RmsNorm():
            return "rms_norm"
        case p.Lookup():
            return "lookup"
        case p.Sum():
            return "sum"
        case p.Reshape():
            return "reshape"
        case p.Permute():
            return "permute"
        case p.Slice():
            return "slice"
        case p.Roll():
            return "roll"
        case p.Pad():
            return "pad"
        case p.Concat():
            return "concat"
        case _:
            assert_never(instruction)


_INPUT, _INPUT_ZERO = Argument("input", Read()), Argument("input_zero", Number())
_LAYER = (
    _INPUT,
    Argument("weight", Constant()),
    Argument("bias", Constant(optional=True)),
    _INPUT_ZERO,
    Argument("weight_zero", Constant(optional=True)),
)
_PAIR = (
    Argument("left", Read()),
    Argument("right", Read()),
    Argument("left_zero", Number()),
    Argument("right_zero", Number()),
)
_SOFTMAX = (
    _INPUT,
    Argument("mask", Constant(optional=True)),
    Argument("values", Constant("u16")),
    Argument("octaves", Constant("s32")),
)
_BOUNDS = (Argument("low", Number()), Argument("high", Number()))
_SHIFT = Argument("shift", Number(1, 62))
_COUNT = Number(1, 2**31, several=True)
_AXES = Argument("axes", Number(0, LARGEST_RANK - 1, several=True))


def form(opcode: Opcode) -> Form:
    """The form of an opcode's instruction in files."""
    match opcode:
        case "linear":
            return Form(p.Linear, _LAYER)
        case "convolution":
            windows = (
                Argument("stride", _COUNT),
                Argument("padding", Number(0, 2**31, several=True)),
                Argument("dilation", _COUNT),
                Argument("groups", Number(1, 2**31)),
            )
            return Form(p.Convolution, (*_LAYER, *windows))
        case "product":
            return Form(p.Product, _PAIR)
        case "multiply":
            return Form(p.Multiply, _PAIR)
        case "requantize":
            sums = (
                Argument("inputs", Read(several=True)),
                Argument("multipliers", Constant("s32", several=True)),
                Argument("addend", Constant()),
            )
            return Form(p.Requantize, (*sums, _SHIFT, *_BOUNDS))
        case "softmax_to_powers":
            powers = (
                Argument("zero", Number(1, 32)),
                Argument("steps", Number(1, 2)),
                Argument("offset", Number(-LARGEST_OFFSET, LARGEST_OFFSET)),
                Argument("published", Flag()),
            )
            return Form(p.SoftmaxToPowers, (*_SOFTMAX, *powers))
        case "softmax_to_levels":
            levels = (
                Argument("multiplier", Number(0, 2**31 - 1)),
                Argument("shift", Number(1, 46)),  # the shift is by 16 bits more, after one half is added
                Argument("output_zero", Number(-(2**31), 2**31 - 1), "result_zero"),
            )
            return Form(p.SoftmaxToLevels, (*_SOFTMAX, *levels, *_BOUNDS))
        case "layer_norm" | "rms_norm":
            normalized = (
                _INPUT,
                Argument("factors", Constant(optional=True)),
                _INPUT_ZERO,
                Argument("epsilon", Number(1, 2**60)),
                Argument("largest", Number()),
                Argument("multiplier", Constant("s32")),
                Argument("addend", Constant()),
            )
            kind = p.LayerNorm if opcode == "layer_norm" else p.RmsNorm
            return Form(kind, (*normalized, _SHIFT, *_BOUNDS))
        case "lookup":
            return Form(p.Lookup, (_INPUT, Argument("table", Constant()), Argument("lowest", Number())))
        case "sum":
            return Form(p.Sum, (_INPUT, _AXES, Argument("keep", Flag()), _INPUT_ZERO))
        case "reshape":
            return Form(p.Reshape, (_INPUT, Argument("shape", Number(-1, 2**62, several=True))))
        case "permute":
            return Form(p.Permute, (_INPUT, _AXES))
        case "slice":
            bounds = (Argument("start", Number()), Argument("stop", Number()), Argument("step", Number()))
            return Form(p.Slice, (_INPUT, Argument("axis", Number(0, LARGEST_RANK - 1)), *bounds))
        case "roll":
            return Form(p.Roll, (_INPUT, Argument("shifts", Number(several=True)), _AXES))
        case "pad":
            return Form(p.Pad, (_INPUT, Argument("amounts", Number(several=True)), Argument("value", Number())))
        case "concat":
            return Form(
                p.Concat, (Argument("inputs", Read(several=True)), Argument("axis", Number(0, LARGEST_RANK - 1)))
            )
        case _:
            assert_never(opcode)


def form_of(instruction: p.Instruction) -> Form:
    """The form of an instruction in files."""
    return form(opcode_of(instruction))


def reads(instruction: p.Instruction) -> tuple[str, ...]:
    """The registers and constants that an instruction reads, in the order of its arguments."""
    read = (each for each in form_of(instruction).arguments if isinstance(each.role, Read | Constant))
    return tuple(str(name) for argument in read for name in argument.values(instruction))

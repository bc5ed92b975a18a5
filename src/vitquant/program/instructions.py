"""An integer program: typed registers, constants, and instructions that write each register once.

docs/program-format.md defines what each instruction computes and how it is stored; `runtime.interpreter` executes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

# Bits and signedness of the register types. Types of less than 8 bits are packed where a program is stored.
TYPES: dict[str, tuple[int, bool]] = {
    "u4": (4, False), "s4": (4, True), "u8": (8, False), "s8": (8, True), "u16": (16, False), "s16": (16, True),
    "s32": (32, True), "s64": (64, True),
}  # fmt: skip


@dataclass(frozen=True)
class Register:
    """A tensor of the program.

    Arguments:
        type: one of `TYPES`.
        shape: sizes; -1 for the one that grows with the batch.
    """

    type: str
    shape: tuple[int, ...]

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest value that the type holds."""
        return type_limits(self.type)


def type_limits(type: str) -> tuple[int, int]:
    """The smallest and the largest value of a type."""
    bits, signed = TYPES[type]
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def smallest_type(low: int, high: int, among: tuple[str, ...] = ("u4", "s4", "u8", "s8", "u16", "s16", "s32")) -> str:
    """The first type of `among` that holds low..high; s64 when none does."""
    for name in among:
        least, most = type_limits(name)
        if least <= low and high <= most:
            return name
    return "s64"


@dataclass(frozen=True)
class _Written:
    """The fields of every instruction: the register that it writes, and the site of the model that it belongs to.

    Operands are names of registers and constants, as strings; a field ending in `_zero` is a zero point.
    """

    output: str
    site: str


@dataclass(frozen=True)
class Linear(_Written):
    """The sum over the last axis of (input - input_zero) * (weight - weight_zero), plus bias."""

    input: str
    weight: str
    bias: str | None
    input_zero: int
    weight_zero: str | None


@dataclass(frozen=True)
class Convolution(_Written):
    """The two-dimensional convolution of input - input_zero with weight - weight_zero, plus bias."""

    input: str
    weight: str
    bias: str | None
    input_zero: int
    weight_zero: str | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Product(_Written):
    """The matrix product of left - left_zero and right - right_zero."""

    left: str
    right: str
    left_zero: int
    right_zero: int


@dataclass(frozen=True)
class Multiply(_Written):
    """(left - left_zero) * (right - right_zero), element by element, with broadcasting."""

    left: str
    right: str
    left_zero: int
    right_zero: int


@dataclass(frozen=True)
class Requantize(_Written):
    """clamp((sum of input * multiplier + addend) >> shift, low, high), the sum in 64 bits.

    Multipliers and addend are broadcast along axes of size one, so that each may be a single number, or differ by
    channel, row, head, or any combination of them.
    """

    inputs: tuple[str, ...]
    multipliers: tuple[str, ...]
    addend: str
    shift: int
    low: int
    high: int


@dataclass(frozen=True)
class SoftmaxToPowers(_Written):
    """Probabilities of the last axis as powers: `integer.softmax.log_int_softmax`, or as published.

    Arguments:
        zero: the code of zero.
        steps: the number of powers in an octave; 1 as published.
        offset: log2 of the scale, the largest power, in units of 2**-12; 0 as published.
        published: whether the rounding is that of FQ-ViT's code.
    """

    input: str
    mask: str | None
    values: str
    octaves: str
    zero: int
    steps: int
    offset: int
    published: bool


@dataclass(frozen=True)
class SoftmaxToLevels(_Written):
    """Probabilities of the last axis on equally spaced levels: `integer.softmax.integer_softmax`."""

    input: str
    mask: str | None
    values: str
    octaves: str
    multiplier: int
    shift: int
    result_zero: int
    low: int
    high: int


@dataclass(frozen=True)
class _Norm(_Written):
    """The fields that all norms share.

    Arguments:
        factors: the shift of each channel; (input - input_zero) << factors is normalized.
        epsilon, largest: see `integer.layer_norm.Norm`.
        multiplier, addend, shift, low, high: the rescaling of normalized values to codes.
    """

    input: str
    factors: str | None
    input_zero: int
    epsilon: int
    largest: int
    multiplier: str
    addend: str
    shift: int
    low: int
    high: int


@dataclass(frozen=True)
class LayerNorm(_Norm):
    """`integer.layer_norm.LayerNorm`."""


@dataclass(frozen=True)
class RmsNorm(_Norm):
    """`integer.rms_norm.RmsNorm`."""


@dataclass(frozen=True)
class Lookup(_Written):
    """The table's entry for each code; the first entry is that of the code `lowest`."""

    input: str
    table: str
    lowest: int


@dataclass(frozen=True)
class Sum(_Written):
    """The sum of input - input_zero over some axes."""

    input: str
    axes: tuple[int, ...]
    keep: bool
    input_zero: int


@dataclass(frozen=True)
class Reshape(_Written):
    """The same elements in another shape; a size of -1 follows from the number of elements."""

    input: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Permute(_Written):
    """The axes in another order."""

    input: str
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Slice(_Written):
    """Every `step`-th element along one axis."""

    input: str
    axis: int
    start: int
    stop: int
    step: int


@dataclass(frozen=True)
class Roll(_Written):
    """The elements rotated along some axes."""

    input: str
    shifts: tuple[int, ...]
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Pad(_Written):
    """The input padded with one value; `amounts` are as for `torch.nn.functional.pad`."""

    input: str
    amounts: tuple[int, ...]
    value: int


@dataclass(frozen=True)
class Concat(_Written):
    """Registers concatenated along one axis; an operand with a batch of one is repeated for every image."""

    inputs: tuple[str, ...]
    axis: int


Move = Reshape | Permute | Slice | Roll | Pad
Softmax = SoftmaxToPowers | SoftmaxToLevels
Norm = LayerNorm | RmsNorm
# Every `match` over instructions ends in `assert_never`, so that pyright reports each place that lacks a new one.
Instruction = Linear | Convolution | Product | Multiply | Requantize | Softmax | Norm | Lookup | Sum | Move | Concat
INSTRUCTIONS: tuple[type[Instruction], ...] = get_args(Instruction)


@dataclass(frozen=True)
class IntegerProgram:
    """A quantized model in integers.

    Arguments:
        input: the name of the register that holds the images' codes.
        outputs: for the name of each output the register that holds its codes.
        registers: the type and shape of every register, constants included.
        constants: int64 tensors; their values fit the type of their register.
        instructions: in order of execution; each register is written by one of them at most.
        codes: for the name of each quantized value of the model the register or constant that holds its codes.
        facts: plain JSON values: under `input` scale, zero point, lowest and highest code; under `outputs` the scales
            and the zero point of each, by name; and the origin of the program.
    """

    input: str
    outputs: Mapping[str, str]
    registers: Mapping[str, Register]
    constants: Mapping[str, Tensor]
    instructions: tuple[Instruction, ...]
    codes: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def run(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        """The program's output in float32 for float32 images (batch, channels, height, width).

        It is a tensor, or a dictionary of tensors by name if the program has several outputs.

        It is computed by `runtime.interpreter`, which is made again for each call: for many batches, call
        `runtime.on_images.interpreted` once and keep the result.

        Raises:
            LoweringError: the program lacks scales and zero points of its input or outputs.
            CaptureError: the images have another size.
        """
        from vitquant.runtime.on_images import interpreted

        return interpreted(self)(images)

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write the program to one file, see `program.storage.save_program`."""
        from vitquant.program.storage import save_program

        save_program(self, path, force)

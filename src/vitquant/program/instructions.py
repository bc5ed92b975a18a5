"""An integer program: typed registers, constants, and instructions that write each register once.

docs/program-format.md says what each instruction computes, and how a file holds it; `runtime.interpreter` does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

# Bits and sign of the types that registers have. Narrower types are packed where a program is stored.
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
    """What every instruction has: the register that it writes, and the site of the model that it belongs to.

    Names of registers and constants are strings; a field ending in `_zero` is the code that stands for zero.
    """

    output: str
    site: str


@dataclass(frozen=True)
class Linear(_Written):
    """sum over the last axis of (input - input_zero) * (weight - weight_zero) + bias."""

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
    """(left - left_zero) * (right - right_zero), element by element; sizes of one are repeated."""

    left: str
    right: str
    left_zero: int
    right_zero: int


@dataclass(frozen=True)
class Requantize(_Written):
    """clamp((sum of input * multiplier + addend) >> shift, low, high), the sum in 64 bits.

    Multipliers and addend are repeated along axes of size one, so each may be one number, or differ by channel, row,
    head, or any of these together.
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
        zero: the code that means zero.
        steps, offset: how many powers an octave has, and how many 2**-12 of octaves the first lies above 1; as
            published 1 and 0.
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
    """What the norms share.

    Arguments:
        factors: shifts of each channel; what is normalized is (input - input_zero) << factors.
        epsilon, largest: see `integer.layer_norm.Norm`.
        multiplier, addend, shift, low, high: from normalized values to codes.
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
    """The table's entry for each code, `lowest` having the first."""

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
    """The same elements in another shape; -1 is what is left."""

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
    """Elements of one value around the input: as `torch.nn.functional.pad` counts them."""

    input: str
    amounts: tuple[int, ...]
    value: int


@dataclass(frozen=True)
class Concat(_Written):
    """Registers joined along one axis; what has a batch of one is repeated."""

    inputs: tuple[str, ...]
    axis: int


Move = Reshape | Permute | Slice | Roll | Pad
Softmax = SoftmaxToPowers | SoftmaxToLevels
Norm = LayerNorm | RmsNorm
# Whatever treats instructions one by one ends in `assert_never`, so that pyright names every place a new one must go.
Instruction = Linear | Convolution | Product | Multiply | Requantize | Softmax | Norm | Lookup | Sum | Move | Concat
INSTRUCTIONS: tuple[type[Instruction], ...] = get_args(Instruction)


@dataclass(frozen=True)
class IntegerProgram:
    """A quantized model in integers.

    Arguments:
        input: the name of the register that holds the images' codes.
        outputs: what the program gives, by name, and the register that holds its codes.
        registers: the type and shape of every register, constants included.
        constants: int64 tensors; their values fit the type of their register.
        instructions: in order; each writes one register, and none twice.
        codes: for the name of each quantized value of the model, the register or constant that holds its codes.
        facts: plain JSON values: of `input` the scale, the zero point, the lowest and the highest code, of `outputs` by
            name the scales and the zero point, and where the program came from.
    """

    input: str
    outputs: Mapping[str, str]
    registers: Mapping[str, Register]
    constants: Mapping[str, Tensor]
    instructions: tuple[Instruction, ...]
    codes: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def run(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        """What the program gives for float32 images (batch, channels, height, width), in float32.

        That is a tensor, or where the program has several outputs a dictionary of tensors by name.

        They are those of `runtime.interpreter`, which is made anew for each call: for many batches keep what
        `runtime.on_images.interpreted` gives.

        Raises:
            LoweringError: the program does not say what its codes stand for.
            CaptureError: images of another size.
        """
        from vitquant.runtime.on_images import interpreted

        return interpreted(self)(images)

    def save(self, path: str | Path, force: bool = False) -> None:
        """Write the program to one file, see `program.storage.save_program`."""
        from vitquant.program.storage import save_program

        save_program(self, path, force)

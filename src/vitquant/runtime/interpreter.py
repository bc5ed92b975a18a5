"""The reference interpreter: the execution of every instruction of an integer program, on int64 tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import assert_never

import torch
from torch import Tensor, nn

from vitquant.autocast import own_precision
from vitquant.errors import CaptureError
from vitquant.integer.activation import look_up
from vitquant.integer.arithmetic import Rescaling
from vitquant.integer.exponential import Exponential
from vitquant.integer.layer_norm import LayerNorm
from vitquant.integer.rms_norm import RmsNorm
from vitquant.integer.softmax import distances, integer_softmax, log_int_softmax, published_log_int_softmax
from vitquant.packing import code_dtype, pack, unpack
from vitquant.program import instructions as p
from vitquant.program.moving import move
from vitquant.program.opcodes import reads
from vitquant.program.shapes import all_shapes
from vitquant.runtime.outputs import Outputs, given
from vitquant.runtime.products import Products, convolution, exact_products, linear, operand

_AT_ONCE = 2**17  # elements of the largest register, 1 MiB: larger ones miss the cache and are allocated anew each time


class Interpreter(nn.Module):
    """Runs an integer program.

    Constants are stored packed, two 4-bit codes to a byte, and unpacked when an instruction reads them. Registers are
    stored in the narrowest dtype for their type; arithmetic is in int64, except matrix products, see `products`.

    Arguments:
        program: what `lower` returned.
        products: chooses the dtypes of matrix products; every choice gives the same integers.
    """

    def __init__(self, program: p.IntegerProgram, products: Products = exact_products) -> None:
        super().__init__()
        self._dtypes = products(program)
        self._names = {name: f"constant{number}" for number, name in enumerate(program.constants)}
        for name, values in program.constants.items():
            packed = pack(values, p.TYPES[program.registers[name].type][0])
            self.register_buffer(self._names[name], packed, persistent=False)
        self.program = replace(program, constants={})
        self._last_use = _last_uses(program)
        shapes = all_shapes(program)
        self._images = -(-_AT_ONCE // max(prod(map(abs, shapes[each.output])) for each in program.instructions))

    def forward(self, codes: Tensor, taps: dict[str, Callable[[Tensor], None]] | None = None) -> Outputs:
        """The codes of the program's outputs, int64 (batch, ...): a tensor, or several by name.

        Arguments:
            codes: of the images, any integer dtype, (batch, channels, height, width).
            taps: functions by the name of a register, called with its value as int64 when it is written.

        Raises:
            CaptureError: the images have another size, or are not codes of the input's type.
        """
        first = self.program.registers[self.program.input]
        if tuple(codes.shape[1:]) != first.shape[1:]:
            raise CaptureError(f"the program is for images of {first.shape[1:]}, these are {tuple(codes.shape[1:])}")
        low, high = first.limits
        if codes.is_floating_point() or bool(((codes < low) | (codes > high)).any()):
            raise CaptureError(
                f"the program reads codes from {low} to {high}; encode the images by its input quantizer"
            )
        if not len(codes):  # a reshape cannot infer a size of -1 for an empty tensor
            shapes = {
                name: self.program.registers[register].shape[1:] for name, register in self.program.outputs.items()
            }
            return given({name: codes.new_zeros((0, *shape), dtype=torch.int64) for name, shape in shapes.items()})
        with own_precision(codes.device.type):  # products are exact in the dtypes that they are computed in
            if taps or codes.device.type != "cpu":
                return given(self._run(codes, taps or {}))
            parts = [self._run(part, {}) for part in codes.split(self._images)]
            return given({name: torch.cat([part[name] for part in parts]) for name in self.program.outputs})

    def begun(self, codes: Tensor) -> list[dict[str, Tensor]]:
        """The registers before the first instruction, by name, for as many images at a time as stay in the cache.

        Arguments:
            codes: of the images, as for `forward`.
        """
        return [self._begun(part) for part in codes.split(self._images)]

    def between(self, registers: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """The registers before the instruction `stop`, from those before the instruction `start`.

        Arguments:
            registers: by name, as from `begun`, perhaps of a program whose instructions from `start` on differ.
        """
        with own_precision(next(iter(registers.values())).device.type):
            return self._steps(dict(registers), range(start, stop))

    def since(self, registers: Mapping[str, Tensor], start: int) -> dict[str, Tensor]:
        """The codes of the program's outputs by name, int64 (batch, ...), from the registers before an instruction."""
        return self._outputs(self.between(registers, start, len(self.program.instructions)))

    def _run(self, codes: Tensor, taps: dict[str, Callable[[Tensor], None]]) -> dict[str, Tensor]:
        return self._outputs(self._steps(self._begun(codes), range(len(self.program.instructions)), taps))

    def _begun(self, codes: Tensor) -> dict[str, Tensor]:
        return {self.program.input: codes.to(_dtype(self.program.registers[self.program.input].type))}

    def _outputs(self, registers: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: registers[register].to(torch.int64) for name, register in self.program.outputs.items()}

    def _steps(
        self, registers: dict[str, Tensor], steps: range, taps: Mapping[str, Callable[[Tensor], None]] | None = None
    ) -> dict[str, Tensor]:
        """Execute some instructions: the registers that later ones read, and those of the outputs."""
        taps = taps or {}
        for index in steps:
            instruction = self.program.instructions[index]
            written = self._execute(instruction, registers)
            registers[instruction.output] = written.to(_dtype(self.program.registers[instruction.output].type))
            if instruction.output in taps:
                taps[instruction.output](registers[instruction.output].to(torch.int64))
            for name in self._last_use.get(index, ()):
                registers.pop(name, None)
        return registers

    def _execute(self, instruction: p.Instruction, registers: dict[str, Tensor]) -> Tensor:
        def held(name: str) -> Tensor:
            if name in registers:
                return registers[name]
            register = self.program.registers[name]
            return unpack(getattr(self, self._names[name]), *p.TYPES[register.type], register.shape)

        def get(name: str) -> Tensor:
            return held(name).to(torch.int64)

        def factor(name: str, zero: int | str | None = None) -> Tensor:
            minus = held(zero) if isinstance(zero, str) else zero
            return operand(held(name), minus, self._dtypes[instruction.output])

        def maybe(name: str | None) -> Tensor | None:
            return None if name is None else get(name)

        match instruction:
            case p.Linear() as i:
                bias = None if i.bias is None else factor(i.bias)
                return linear(factor(i.input, i.input_zero), factor(i.weight, i.weight_zero), bias)
            case p.Convolution() as i:
                bias = None if i.bias is None else factor(i.bias)
                return convolution(factor(i.input, i.input_zero), factor(i.weight, i.weight_zero), bias, i)
            case p.Product() as i:
                return torch.matmul(factor(i.left, i.left_zero), factor(i.right, i.right_zero))
            case p.Multiply() as i:
                return (get(i.left) - i.left_zero) * (get(i.right) - i.right_zero)
            case p.Requantize() as i:
                total = get(i.addend)
                for name, multiplier in zip(i.inputs, i.multipliers, strict=True):
                    total = torch.addcmul(total, get(name), get(multiplier))
                return total.bitwise_right_shift_(i.shift).clamp_(i.low, i.high)
            case p.SoftmaxToPowers() as i:
                table = Exponential(get(i.values), get(i.octaves))
                distance = distances(get(i.input), _true(maybe(i.mask)), table)
                if i.published:
                    return published_log_int_softmax(distance, table, i.zero)
                return log_int_softmax(distance, table, i.zero, i.steps, i.offset)
            case p.SoftmaxToLevels() as i:
                table = Exponential(get(i.values), get(i.octaves))
                distance = distances(get(i.input), _true(maybe(i.mask)), table)
                return (integer_softmax(distance, table, i.multiplier, i.shift) + i.result_zero).clamp(i.low, i.high)
            case p.LayerNorm() | p.RmsNorm() as i:
                x = get(i.input) - i.input_zero
                if i.factors is not None:
                    x = x << get(i.factors)
                affine = Rescaling(get(i.multiplier), get(i.addend), i.shift)
                form = LayerNorm if isinstance(i, p.LayerNorm) else RmsNorm
                return form(i.epsilon, i.largest, affine, i.low, i.high).apply(x)
            case p.Lookup() as i:
                return look_up(get(i.input), get(i.table), i.lowest)
            case p.Sum() as i:
                return (get(i.input) - i.input_zero).sum(i.axes, keepdim=i.keep)
            case p.Concat() as i:
                return _concatenated([get(name) for name in i.inputs], i.axis)
            case p.Reshape() | p.Permute() | p.Slice() | p.Roll() | p.Pad() as i:
                return move(i, held(i.input).to(_dtype(self.program.registers[i.output].type)))
            case _:
                assert_never(instruction)


def _dtype(type: str) -> torch.dtype:
    """The dtype in which registers of a type are stored."""
    return code_dtype(*p.TYPES[type])


def _true(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask > 0


def _concatenated(parts: list[Tensor], axis: int) -> Tensor:
    batch = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(batch, *part.shape[1:]) for part in parts], axis)


def _last_uses(program: p.IntegerProgram) -> dict[int, list[str]]:
    """For each instruction, by its index, the registers that no later instruction reads."""
    last = {name: index for index, each in enumerate(program.instructions) for name in reads(each)}
    found: dict[int, list[str]] = {}
    for name, index in last.items():
        if name not in program.outputs.values():
            found.setdefault(index, []).append(name)
    return found

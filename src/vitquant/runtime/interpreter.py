"""The reference interpreter: what every instruction of an integer program means, in int64 tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitquant.errors import CaptureError
from vitquant.integer.activation import look_up
from vitquant.integer.arithmetic import Rescaling
from vitquant.integer.exponential import Exponential
from vitquant.integer.layer_norm import LayerNorm
from vitquant.integer.softmax import distances, integer_softmax, log_int_softmax, published_log_int_softmax
from vitquant.program import instructions as p
from vitquant.program.moving import move
from vitquant.runtime.products import Products, exact_products


class Interpreter(nn.Module):
    """Runs an integer program.

    Arguments:
        program: what `lower` returned.
        products: how matrix products are computed; they all give the same integers.
    """

    def __init__(self, program: p.IntegerProgram, products: Products = exact_products) -> None:
        super().__init__()
        self.program, self.products = program, products
        self._names = {name: f"constant{number}" for number, name in enumerate(program.constants)}
        for name, values in program.constants.items():
            self.register_buffer(self._names[name], values, persistent=False)
        self._last_use = _last_uses(program)

    def forward(self, codes: Tensor, taps: dict[str, Callable[[Tensor], None]] | None = None) -> Tensor:
        """The codes of the logits, int64 (batch, classes).

        Arguments:
            codes: of the images, any integer dtype, (batch, channels, height, width).
            taps: called with registers by name, as they are written.

        Raises:
            CaptureError: images of another size.
        """
        expected = self.program.registers[self.program.input].shape
        if tuple(codes.shape[1:]) != expected[1:]:
            raise CaptureError(f"the program is for images of {expected[1:]}, these are {tuple(codes.shape[1:])}")
        registers = {self.program.input: codes.to(torch.int64)}
        for index, instruction in enumerate(self.program.instructions):
            registers[instruction.output] = self._execute(instruction, registers)
            if taps and instruction.output in taps:
                taps[instruction.output](registers[instruction.output])
            for name in self._last_use.get(index, ()):
                registers.pop(name, None)
        return registers[self.program.output]

    def _execute(self, instruction: p.Instruction, registers: dict[str, Tensor]) -> Tensor:
        def get(name: str) -> Tensor:
            return registers[name] if name in registers else getattr(self, self._names[name])

        def maybe(name: str | None) -> Tensor | None:
            return None if name is None else get(name)

        match instruction:
            case p.Linear() as i:
                return self.products.linear(
                    get(i.input) - i.input_zero, _less(get(i.weight), maybe(i.weight_zero)), maybe(i.bias)
                )
            case p.Convolution() as i:
                return self.products.convolution(
                    get(i.input) - i.input_zero, _less(get(i.weight), maybe(i.weight_zero)), maybe(i.bias), i
                )
            case p.Product() as i:
                return self.products.matmul(get(i.left) - i.left_zero, get(i.right) - i.right_zero)
            case p.Multiply() as i:
                return (get(i.left) - i.left_zero) * (get(i.right) - i.right_zero)
            case p.Requantize() as i:
                total = get(i.addend)
                for name, multiplier in zip(i.inputs, i.multipliers, strict=True):
                    total = total + get(name) * get(multiplier)
                return (total >> i.shift).clamp_(i.low, i.high)
            case p.LogSoftmax() as i:
                table = Exponential(get(i.values), get(i.octaves))
                softmax = published_log_int_softmax if i.published else log_int_softmax
                return softmax(distances(get(i.input), _true(maybe(i.hidden)), table), table, i.zero)
            case p.UniformSoftmax() as i:
                table = Exponential(get(i.values), get(i.octaves))
                distance = distances(get(i.input), _true(maybe(i.hidden)), table)
                return (integer_softmax(distance, table, i.multiplier, i.shift) + i.result_zero).clamp(i.low, i.high)
            case p.LayerNorm() as i:
                x = get(i.input) - i.input_zero
                if i.factors is not None:
                    x = x << get(i.factors)
                affine = Rescaling(get(i.multiplier), get(i.addend), i.shift)
                return LayerNorm(i.epsilon, i.largest, affine, i.low, i.high).apply(x)
            case p.Lookup() as i:
                return look_up(get(i.input), get(i.table), i.lowest)
            case p.Sum() as i:
                return (get(i.input) - i.input_zero).sum(i.axes, keepdim=i.keep)
            case p.Concat() as i:
                return _concatenated([get(name) for name in i.inputs], i.axis)
            case _:
                return move(instruction, get(instruction.input))  # type: ignore[attr-defined]


def _less(weight: Tensor, zero: Tensor | None) -> Tensor:
    return weight if zero is None else weight - zero


def _true(hidden: Tensor | None) -> Tensor | None:
    return None if hidden is None else hidden > 0


def _concatenated(parts: list[Tensor], axis: int) -> Tensor:
    batch = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(batch, *part.shape[1:]) for part in parts], axis)


def _last_uses(program: p.IntegerProgram) -> dict[int, list[str]]:
    """For each instruction the registers that nobody reads after it."""
    last = {name: index for index, each in enumerate(program.instructions) for name in p.reads(each)}
    found: dict[int, list[str]] = {}
    for name, index in last.items():
        if name != program.output:
            found.setdefault(index, []).append(name)
    return found

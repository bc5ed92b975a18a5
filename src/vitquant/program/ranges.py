"""The range of every register of a program for any input, from its real constants: overflow is proved away."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from vitquant.errors import LoweringError
from vitquant.program import instructions as p

Range = tuple[int, int]

# The codes of log-int-softmax stand for powers of two that are at most 1.5 times the probability, by either rounding
# (sqrt(2), or 1.5), and tables of 15 bits add less than 1/16: a row of them sums to less than 1.6.
_ROW_OF_POWERS = (8, 5)


def prove_ranges(program: p.IntegerProgram) -> dict[str, Range]:
    """For each register the smallest and the largest value that any image can give it.

    Raises:
        LoweringError: a register can leave its type, or a sum inside an instruction 64 bits; it names the site.
    """
    return _Proof(program).ranges()


class _Proof:
    """Goes through a program once; knows a range for each register, and for some the sum of a row."""

    def __init__(self, program: p.IntegerProgram) -> None:
        self.program = program
        self.found: dict[str, Range] = {name: _extremes(values) for name, values in program.constants.items()}
        self.found[program.input] = program.registers[program.input].limits
        self.row_sums: dict[str, int] = {}

    def ranges(self) -> dict[str, Range]:
        """Prove every instruction."""
        for instruction in self.program.instructions:
            low, high = self.found[instruction.output] = self._range(instruction)
            least, most = self.program.registers[instruction.output].limits
            if low < least or high > most:
                kind = self.program.registers[instruction.output].type
                where = f"{instruction.site}: values from {low} to {high} do not fit {kind}"
                raise LoweringError(f"{where}; use fewer bits for its operands")
        return self.found

    def _range(self, instruction: p.Instruction) -> Range:
        match instruction:
            case p.Linear() | p.Convolution() as i:
                return self._weighted(i)
            case p.Product() as i:
                return self._product(i)
            case p.Multiply() as i:
                left, right = self._less(i.left, i.left_zero), self._less(i.right, i.right_zero)
                corners = [a * b for a in left for b in right]
                return min(corners), max(corners)
            case p.Requantize() as i:
                return self._requantized(i)
            case p.LogSoftmax() as i:
                return 0, i.zero
            case p.UniformSoftmax() | p.LayerNorm() as i:
                return i.low, i.high
            case p.Lookup() as i:
                self._powers(i)
                return self.found[i.table]
            case p.Sum() as i:
                low, high = self._less(i.input, i.input_zero)
                count = prod(self.program.registers[i.input].shape[axis] for axis in i.axes)
                return count * low, count * high
            case p.Concat() as i:
                ranges = [self.found[name] for name in i.inputs]
                return min(low for low, _ in ranges), max(high for _, high in ranges)
            case p.Pad() as i:
                low, high = self.found[i.input]
                return min(low, i.value), max(high, i.value)
            case p.Reshape() | p.Permute() | p.Slice() | p.Roll() as i:
                if i.input in self.row_sums and self._keeps_rows(i):
                    self.row_sums[i.output] = self.row_sums[i.input]
                return self.found[i.input]
            case _:
                raise LoweringError(f"{instruction.site}: {type(instruction).__name__} has no proof; report this")

    def _less(self, name: str, zero: int) -> Range:
        low, high = self.found[name]
        return low - zero, high - zero

    def _weighted(self, i: p.Linear | p.Convolution) -> Range:
        """The extremes of each output channel, from its own weights."""
        low, high = self._less(i.input, i.input_zero)
        if isinstance(i, p.Convolution):
            low, high = min(low, 0), max(high, 0)  # padding is zero
        weight = self.program.constants[i.weight]
        if i.weight_zero is not None:
            weight = weight - self.program.constants[i.weight_zero]
        weight = weight.flatten(1)
        up, down = weight.clamp(min=0).sum(1), weight.clamp(max=0).sum(1)
        bias = 0 if i.bias is None else self.program.constants[i.bias]
        return int((up * low + down * high + bias).min()), int((up * high + down * low + bias).max())

    def _product(self, i: p.Product) -> Range:
        left, right = self._less(i.left, i.left_zero), self._less(i.right, i.right_zero)
        largest = max(abs(bound) for bound in right)
        if i.left in self.row_sums and i.left_zero == 0:
            return -self.row_sums[i.left] * largest, self.row_sums[i.left] * largest
        count = self.program.registers[i.left].shape[-1]
        corners = [a * b for a in left for b in right]
        return count * min(*corners, 0), count * max(*corners, 0)

    def _requantized(self, i: p.Requantize) -> Range:
        bound = max(abs(value) for value in self.found[i.addend])
        for name, multiplier in zip(i.inputs, i.multipliers, strict=True):
            product = max(map(abs, self.found[name])) * max(map(abs, self.found[multiplier]))
            bound += product
        if bound >= 2**63:
            raise LoweringError(f"{i.site}: a rescaled sum may exceed 64 bits; use fewer bits for its operands")
        return i.low, i.high

    def _powers(self, i: p.Lookup) -> None:
        """What a row of powers of two sums to at most."""
        source = self.program.constants[i.table]
        if any(isinstance(each, p.LogSoftmax) and each.output == i.input for each in self.program.instructions):
            times, of = _ROW_OF_POWERS
            self.row_sums[i.output] = int(source.max()) * times // of

    def _keeps_rows(self, i: p.Reshape | p.Permute | p.Slice | p.Roll) -> bool:
        """Whether rows of the result are rows of the input."""
        before, after = self.program.registers[i.input].shape, self.program.registers[i.output].shape
        if isinstance(i, p.Permute):
            return i.axes[-1] == len(before) - 1
        return isinstance(i, p.Reshape) and before[-1] == after[-1] != -1


def _extremes(values: Tensor) -> Range:
    low, high = torch.aminmax(values)
    return int(low), int(high)

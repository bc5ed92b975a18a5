"""The laws of integer programs, on programs made at random of every instruction."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitquant.integer.arithmetic import rescaling
from vitquant.integer.exponential import exact_exponential
from vitquant.program import instructions as p
from vitquant.program.checking import check_program
from vitquant.program.ranges import prove_ranges, prove_terms
from vitquant.program.shapes import Shape, written_shape
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.products import exact_int64

CODES = ("u4", "s4", "u8", "s8")


class Maker:
    """Makes a program of instructions that fit together; `x` is the register that comes next."""

    def __init__(self, seed: int) -> None:
        self.random, self.torch = Random(seed), torch.Generator().manual_seed(seed)
        sizes = [self.random.randint(1, 4), self.random.randint(2, 6), self.random.randint(2, 6)]
        self.registers = {"input": p.Register(self.random.choice([*CODES, "u16", "s16"]), (-1, *sizes))}
        self.shapes: dict[str, Shape] = {"input": (-1, *sizes)}
        self.constants: dict[str, Tensor] = {}
        self.instructions: list[p.Instruction] = []
        self.x = "input"

    @property
    def shape(self) -> Shape:
        return self.shapes[self.x]

    @property
    def limits(self) -> tuple[int, int]:
        return self.registers[self.x].limits

    def constant(self, type: str, *shape: int, values: Tensor | None = None) -> str:
        """Noise, or the extremes of a type."""
        low, high = p.type_limits(type)
        if values is None:
            values = torch.randint(low, high + 1, shape, generator=self.torch)
            if self.random.random() < 0.3:
                values = torch.where(values < (low + high + 1) // 2, low, high)
        name = f"c{len(self.constants)}"
        self.constants[name], self.registers[name] = values.long(), p.Register(type, tuple(values.shape))
        self.shapes[name] = tuple(values.shape)
        return name

    def emit(self, kind: type[p.Instruction], type: str, **given: object) -> str:
        output = f"r{len(self.instructions)}"
        instruction = kind(output=output, site=f"site {output}", **given)  # type: ignore[arg-type]
        self.shapes[output] = shape = written_shape(instruction, self.shapes)
        self.registers[output] = p.Register(type, tuple(max(size, -1) for size in shape))
        self.instructions.append(instruction)
        return output

    def zero(self, name: str | None = None) -> int:
        low, high = self.registers[name or self.x].limits
        return self.random.choice([0, low, high, self.random.randint(low, high)])

    def channels(self, *shape: int) -> Shape:
        """A shape that is repeated to another: some of its sizes are one."""
        return tuple(size if size > 0 and self.random.random() < 0.5 else 1 for size in shape)

    def program(self) -> p.IntegerProgram:
        return p.IntegerProgram(
            "input",
            {"output": self.x},
            self.registers,
            self.constants,
            tuple(self.instructions),
            {"x": self.x},
            {"note": 1},
        )

    # Instructions: each reads codes and leaves codes.

    def requantize(self, *sums: str) -> None:
        """To codes, of sums that may be large, most of them within the result's range."""
        shape, ranges = self.shapes[sums[0]], prove_ranges(self.program())
        type = self.random.choice(CODES)
        low, high = p.type_limits(type)
        length = max(abs(bound).bit_length() for name in sums for bound in ranges[name])
        digits = self.random.randint(1, min(31, 60 - length))
        most = (1 << digits) - 1
        multipliers = [
            torch.randint(-most, most + 1, self.channels(*shape[-2:]), generator=self.torch).clamp(max=2**31 - 1)
            for _ in sums
        ]
        addend = torch.randint(-(2**50), 2**50, self.channels(*shape[-1:]), generator=self.torch)
        self.x = self.emit(
            p.Requantize, type, inputs=sums, multipliers=tuple(self.constant("s32", values=m) for m in multipliers),
            addend=self.constant("s64", values=addend % (1 << (length + digits))),
            shift=max(1, length + digits - self.random.randint(4, 10)), low=self.random.randint(low, 0), high=high,
        )  # fmt: skip

    def linear(self) -> None:
        outputs, inputs = self.random.randint(1, 5), self.shape[-1]
        sums = self.emit(
            p.Linear, "s64", input=self.x, weight=self.constant(self.random.choice([*CODES, "s16"]), outputs, inputs),
            bias=self.random.choice([None, self.constant("s32", outputs)]), input_zero=self.zero(),
            weight_zero=self.random.choice([None, self.constant("s8", outputs, 1), self.constant("u8", 1)]),
        )  # fmt: skip
        self.requantize(sums)

    def convolution(self) -> None:
        if len(self.shape) != 4 or min(self.shape[1:]) < 1:
            return
        groups = self.random.choice([g for g in range(1, 5) if self.shape[1] % g == 0])
        kernel, dilation = (self.random.randint(1, 3), self.random.randint(1, 3)), (1, self.random.randint(1, 2))
        padding = tuple(
            max(self.random.randint(0, 2), d * (k - 1) + 1 - size)
            for size, k, d in zip(self.shape[2:], kernel, dilation, strict=True)
        )
        outputs = groups * self.random.randint(1, 2)
        sums = self.emit(
            p.Convolution, "s64", input=self.x,
            weight=self.constant(self.random.choice(CODES), outputs, self.shape[1] // groups, *kernel),
            bias=self.random.choice([None, self.constant("s32", outputs)]), input_zero=self.zero(),
            weight_zero=self.random.choice([None, self.constant("s8", outputs, 1, 1, 1)]),
            stride=(self.random.randint(1, 2), self.random.randint(1, 3)), padding=padding, dilation=dilation,
            groups=groups,
        )  # fmt: skip
        self.requantize(sums)

    def product(self) -> None:
        right = [*range(len(self.shape))]
        right[-2:] = right[-1], right[-2]
        if min(self.shape[-2:]) < 1:
            return
        other = self.emit(p.Permute, self.registers[self.x].type, input=self.x, axes=tuple(right))
        given = {"left_zero": self.zero(), "right_zero": self.zero()}
        self.requantize(self.emit(p.Product, "s64", left=self.x, right=other, **given))

    def multiply(self) -> None:
        other = self.random.choice([self.x, self.constant("s8", *self.channels(*self.shape[-2:]))])
        zeros = {"left_zero": self.zero(), "right_zero": self.zero(other)}
        self.requantize(self.emit(p.Multiply, "s64", left=self.x, right=other, **zeros), self.x)

    def softmax(self) -> None:
        low, high = self.limits
        if high - low > 255:
            return
        table = exact_exponential(self.random.choice([0.001, 0.05, 0.7]), high - low + 1)
        given = {
            "input": self.x, "values": self.constant("u16", values=table.values),
            "octaves": self.constant("s32", values=table.octaves),
            "mask": self.random.choice([None, self.constant("u8", values=self.mask())]),
        }  # fmt: skip
        if self.random.random() < 0.5:
            type = self.random.choice(CODES)
            self.x = self.emit(
                p.SoftmaxToLevels, type, **given, multiplier=self.random.choice([255 << 20, 2**31 - 1]),
                shift=self.random.choice([20, 30, 46]), result_zero=self.zero(), low=p.type_limits(type)[0] + 1,
                high=p.type_limits(type)[1],
            )  # fmt: skip
            return
        published, steps = self.random.random() < 0.3, self.random.choice([1, 2])
        steps = 1 if published else steps
        offset = 0 if published else self.random.choice([0, -3000, -9999, 700])
        form = {"zero": 15, "steps": steps, "offset": offset, "published": published}
        self.x = self.emit(p.SoftmaxToPowers, "u4", **given, **form)
        parity = self.random.randrange(steps)  # one of the registers that powers of the root of two are
        powers = torch.tensor([(code % steps == parity) << (14 - -(-code // steps)) for code in range(15)] + [0])
        self.x = self.emit(p.Lookup, "u16", input=self.x, table=self.constant("u16", values=powers), lowest=0)
        if self.random.random() < 0.7 and min(self.shape[-2:]) > 0:
            other = self.constant(self.random.choice(CODES), self.shape[-1], 3)
            given = {"left_zero": 0, "right_zero": self.zero(other)}
            self.x = self.emit(p.Product, "s64", left=self.x, right=other, **given)
        self.requantize(self.x)

    def mask(self) -> Tensor:
        return torch.randint(0, 2, self.channels(*self.shape[-2:]), generator=self.torch)

    def layer_norm(self) -> None:
        zero, shifts = self.zero(), self.constant("u8", values=torch.randint(0, 4, self.channels(self.shape[-1])))
        largest = max(abs(self.limits[0] - zero), abs(self.limits[1] - zero)) << int(self.constants[shifts].max())
        affine = rescaling(torch.randn(self.shape[-1]).double() / 2**11, torch.randn(self.shape[-1]).double() * 9)
        type = self.random.choice(CODES)
        low, high = p.type_limits(type)
        self.x = self.emit(
            self.random.choice([p.LayerNorm, p.RmsNorm]), type, input=self.x, factors=shifts, input_zero=zero,
            epsilon=self.random.choice([1, 2**40]), largest=largest,
            multiplier=self.constant("s32", values=affine.multiplier),
            addend=self.constant("s64", values=affine.addend), shift=affine.shift, low=low, high=high,
        )  # fmt: skip

    def lookup(self) -> None:
        (low, high), type = self.limits, self.random.choice(CODES)
        self.x = self.emit(
            p.Lookup, type, input=self.x, table=self.constant(type, high - low + 1), lowest=self.limits[0]
        )

    def sum(self) -> None:
        axes = [axis for axis, size in enumerate(self.shape) if size > 0]
        axes = self.random.sample(axes, self.random.randint(1, max(1, len(axes) - 2)))
        keep = self.random.random() < 0.5 or len(self.shape) < 4
        self.requantize(self.emit(p.Sum, "s32", input=self.x, axes=tuple(axes), keep=keep, input_zero=self.zero()))

    def move(self) -> None:
        fixed = [axis for axis, size in enumerate(self.shape) if size > 0]
        axis, type = self.random.choice(fixed), self.registers[self.x].type
        match self.random.randint(0, 5):
            case 0:
                order = self.random.sample(range(len(self.shape)), len(self.shape))
                self.x = self.emit(p.Permute, type, input=self.x, axes=tuple(order))
            case 1:
                start = self.random.randint(0, self.shape[axis] - 1)
                stop, step = self.random.randint(start + 1, self.shape[axis]), self.random.randint(1, 3)
                self.x = self.emit(p.Slice, type, input=self.x, axis=axis, start=start, stop=stop, step=step)
            case 2:
                axes = tuple(self.random.sample(fixed, self.random.randint(1, len(fixed))))
                shifts = tuple(self.random.randint(-9, 9) for _ in axes)
                self.x = self.emit(p.Roll, type, input=self.x, shifts=shifts, axes=axes)
            case 3 if self.shape[-1] > 0:
                amounts = (self.random.randint(0, 2), self.random.randint(0, 2))
                self.x = self.emit(p.Pad, type, input=self.x, amounts=amounts, value=self.zero())
            case 4 if self.shape[0] == -1:
                other = (1, *self.shape[1:])
                parts = [self.x, self.constant(type, *other), self.x]
                self.random.shuffle(parts)
                self.x = self.emit(p.Concat, type, inputs=tuple(parts), axis=self.random.randint(1, len(other) - 1))
            case _ if self.shape[0] == -1:
                rest = prod(self.shape[1:])
                if rest < 300:
                    shape = (-1, *self.random.choice([(rest, 1), (1, rest), (*self.shape[2:], self.shape[1])]))
                    self.x = self.emit(p.Reshape, type, input=self.x, shape=shape)

    def finish(self) -> None:
        """Images first, and codes of them if nothing was written yet."""
        batch = next(axis for axis, size in enumerate(self.shape) if size < 0)
        order = (batch, *(axis for axis in range(len(self.shape)) if axis != batch))
        self.x = self.emit(p.Permute, self.registers[self.x].type, input=self.x, axes=order)


STEPS = ("linear", "convolution", "product", "multiply", "softmax", "layer_norm", "lookup", "sum", "move", "move")


def made(seed: int, steps: int = 8) -> p.IntegerProgram:
    maker = Maker(seed)
    torch.manual_seed(seed)
    for _ in range(steps):
        step = maker.random.choice(STEPS)
        if min(maker.shape[-2:]) < 0:
            step = "finish"
        if len(maker.shape) >= 3 and prod(map(abs, maker.shape)) < 2000:
            getattr(maker, step)()
    maker.finish()
    return maker.program()


def codes_of(program: p.IntegerProgram, seed: int) -> Tensor:
    """Five images: noise, and the extremes of the type, whole and scattered."""
    register, random = program.registers["input"], torch.Generator().manual_seed(seed)
    low, high = register.limits
    codes = torch.randint(low, high + 1, (5, *register.shape[1:]), generator=random)
    codes[0], codes[1] = low, high
    codes[2] = torch.where(codes[2] % 2 == 0, low, high)
    return codes


SEEDS = st.integers(0, 2**31)


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_values_lie_in_their_proved_ranges_and_have_the_shapes_that_are_said(seed: int) -> None:
    program = made(seed)
    check_program(program)
    ranges, codes, seen = prove_ranges(program), codes_of(program, seed), []

    def look(name: str, x: Tensor) -> None:
        seen.append(name)
        assert ranges[name][0] <= int(x.min()), name
        assert int(x.max()) <= ranges[name][1], name
        one = [size if size >= 0 else x.shape[axis] for axis, size in enumerate(program.registers[name].shape)]
        assert list(x.shape) == one
        assert all(size % len(codes) == 0 for size in [x.shape[program.registers[name].shape.index(-1)]])

    taps = {each.output: lambda x, name=each.output: look(name, x) for each in program.instructions}
    Interpreter(program, exact_int64)(codes, taps)
    assert len(seen) == len(program.instructions)


@settings(max_examples=150, deadline=None)
@given(SEEDS)
def test_products_in_floating_point_are_those_in_int64(seed: int) -> None:
    program = made(seed)
    codes = codes_of(program, seed)
    assert torch.equal(Interpreter(program)(codes), Interpreter(program, exact_int64)(codes))


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_an_image_is_computed_alone(seed: int) -> None:
    """So a batch may be computed in parts."""
    program = made(seed)
    run, codes = Interpreter(program), codes_of(program, seed)
    whole = run(codes, {program.outputs["output"]: lambda x: None})
    assert torch.equal(run(codes), whole)
    assert torch.equal(torch.cat([run(image[None]) for image in codes]), whole)


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_terms_bound_every_sum_of_absolute_products(seed: int) -> None:
    """Of the same program with absolute operands: weights, biases, and what remains of codes without zero points."""
    program = made(seed)
    terms, values = prove_terms(program), {"input": codes_of(program, seed), **program.constants}
    taps = {each.output: lambda x, name=each.output: values.__setitem__(name, x) for each in program.instructions}
    Interpreter(program, exact_int64)(values["input"], taps)
    for each in program.instructions:
        if isinstance(each, p.Product):
            left, right = (values[each.left] - each.left_zero).abs(), (values[each.right] - each.right_zero).abs()
            found = torch.matmul(left, right)
        elif isinstance(each, p.Linear):
            zero = 0 if each.weight_zero is None else values[each.weight_zero]
            left, right = (values[each.input] - each.input_zero).abs(), (values[each.weight] - zero).abs()
            found = torch.matmul(left, right.mT) + (0 if each.bias is None else values[each.bias].abs())
        else:
            continue
        bound = terms[each.output]
        assert max(int(found.max()), int(left.max()), int(right.max())) <= bound.total
        lowest = [(v & -v).clamp(min=1) for v in (left, right)]
        assert max(int((v // d).max()) for v, d in zip((left, right), lowest, strict=True)) < 2**bound.digits


def test_random_programs_have_every_instruction_and_every_dtype_of_products() -> None:
    """Or the laws above would say less than they seem to."""
    from vitquant.runtime.products import exact_products

    programs = [made(seed) for seed in range(150)]
    kinds = Counter(type(each) for program in programs for each in program.instructions)
    assert min(kinds[kind] for kind in p.INSTRUCTIONS) >= 10, kinds
    dtypes = Counter(dtype for program in programs for dtype in exact_products(program).values())
    assert min(dtypes[dtype] for dtype in (torch.float32, torch.float64)) >= 20, dtypes


@pytest.mark.parametrize("seed", range(20))
def test_a_program_without_one_of_its_instructions_is_refused(seed: int) -> None:
    from vitquant.errors import LoweringError

    program = made(seed)
    for index in range(len(program.instructions)):
        rest = program.instructions[:index] + program.instructions[index + 1 :]
        with pytest.raises(LoweringError):
            check_program(replace(program, instructions=rest))

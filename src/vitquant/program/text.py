"""An integer program as text, one line per instruction, to read and to compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, assert_never

from vitquant.program import instructions as p
from vitquant.program.opcodes import Argument, Constant, Flag, Number, Read, form_of, opcode_of
from vitquant.program.shapes import Shape, all_shapes


def text_form(program: p.IntegerProgram, scales: Mapping[str, tuple[float, float]] | None = None) -> list[str]:
    """The lines of a program: its input, its instructions in their order, and its outputs.

    A line has the output register with type and shape, the opcode, the arguments in the order of
    docs/program-format.md, and the site. N is the number of images. A multiplier is followed by the real factor that it
    is with its shift, or by the smallest and the largest factor where they differ.

    Arguments:
        program: a valid one.
        scales: the smallest and the largest scale of registers' codes, by the register's name.

    Raises:
        LoweringError: the shapes in the program do not fit together.
    """
    return _Lines(program, scales or {}).all()


class _Lines:
    def __init__(self, program: p.IntegerProgram, scales: Mapping[str, tuple[float, float]]) -> None:
        self.program, self.scales, self.shapes = program, scales, all_shapes(program)

    def all(self) -> list[str]:
        program = self.program
        return [
            f"input {self._typed(program.input)}{_quantization(program.facts.get('input'))}",
            *(self._line(each) for each in program.instructions),
            *(self._output(name, register) for name, register in program.outputs.items()),
        ]

    def _output(self, name: str, register: str) -> str:
        return (
            f"output {name} = {self._typed(register)}{_quantization(self.program.facts.get('outputs', {}).get(name))}"
        )

    def _line(self, i: p.Instruction) -> str:
        arguments = ", ".join(self._argument(each, i) for each in form_of(i).arguments)
        return f"{self._typed(i.output)} = {opcode_of(i)}({arguments})  # {i.site}{self._scale(i.output)}"

    def _argument(self, argument: Argument, i: p.Instruction) -> str:
        role, value, values = argument.role, argument.of(i), argument.values(i)
        match role:
            case Read():
                words = [str(name) for name in values]
            case Constant():
                words = [self._constant(argument, str(name), i) for name in values]
            case Number():
                words = [str(number) for number in values]
            case Flag():
                words = ["true" if value else "false"]
            case _:
                assert_never(role)
        return f"{argument.key}={_listed(words) if isinstance(value, tuple) else (words or ['none'])[0]}"

    def _constant(self, argument: Argument, name: str, i: p.Instruction) -> str:
        """The text of a constant, with the real factor where it is a multiplier of a requantization."""
        text = f"{self._typed(name)}{self._scale(name)}"
        if argument.key != "multipliers" or not isinstance(i, p.Requantize):
            return text
        values = self.program.constants[name]
        return f"{text} *{_span((int(values.min()) / 2**i.shift, int(values.max()) / 2**i.shift))}"

    def _scale(self, name: str) -> str:
        return f" scale {_span(self.scales[name])}" if name in self.scales else ""

    def _typed(self, name: str) -> str:
        return f"{name}: {self.program.registers[name].type}{_shaped(self.shapes[name])}"


def _shaped(shape: Shape) -> str:
    return _listed("N" if size == -1 else f"{-size}N" if size < 0 else str(size) for size in shape)


def _listed(words: Iterable[str]) -> str:
    return f"[{', '.join(words)}]"


def _quantization(said: Mapping[str, Any] | None) -> str:
    """The text of scale, zero point and codes, where the program has them."""
    if not said:
        return ""
    scales = said["scale"] if isinstance(said["scale"], list) else [said["scale"]]
    limits = f", codes {said['low']}..{said['high']}" if "low" in said else ""
    return f"  # scale {_span((min(scales), max(scales)))}, zero point {said['zero_point']}{limits}"


def _span(of: tuple[float, float]) -> str:
    low, high = (f"{value:.6g}" for value in of)
    return low if low == high else f"{low}..{high}"

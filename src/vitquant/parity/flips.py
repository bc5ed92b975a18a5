"""Flipped codes, which the integer program rounds differently from the simulation, counted where they arise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter as GraphInterpreter

from vitquant.integer_modules import IntegerOperation
from vitquant.model import QuantizedModel
from vitquant.model.simulation import ExactSimulation
from vitquant.program.instructions import IntegerProgram
from vitquant.progress import Progress, silent
from vitquant.quantizers import Quantizer
from vitquant.runtime.interpreter import Interpreter

RESCALING = "rescaling"
FLIPPED = 1e-3  # the share of codes that a rescaling may round differently from the simulation
_AT_ONCE = 4  # images at once, all of whose registers are in memory


@dataclass(frozen=True)
class Flips:
    """The codes of one value that the integer program rounds differently from the simulation, given the same operands.

    Arguments:
        value: the name of the quantized value.
        made_by: `rescaling`, or the kind of the operation that computes these codes.
        codes: the number of compared codes.
        flipped: the number of codes that differ.
        largest: the largest difference, in steps.
    """

    value: str
    made_by: str
    codes: int
    flipped: int
    largest: int

    @property
    def share(self) -> float:
        """The share of codes that differ."""
        return self.flipped / self.codes

    @property
    def kept(self) -> bool:
        """Whether the criterion is met: a rescaling flips at most a share `FLIPPED`, or one, by a step; others none."""
        few = self.flipped <= max(1, FLIPPED * self.codes)
        return self.flipped == 0 or (self.made_by == RESCALING and few and self.largest <= 1)


def flipped_codes(
    model: QuantizedModel,
    program: IntegerProgram,
    batches: Iterable[Tensor],
    progress: Progress = silent,
) -> list[Flips]:
    """Count the codes that the integer program rounds differently from the simulation, value by value.

    The simulation runs beside the program and continues with the program's codes after every quantizer, so that a
    flipped code is counted only where it arises. It runs in float64, since float32 by itself flips three codes of a
    million, and one of a thousand 16-bit codes.

    Arguments:
        model: calibrated.
        program: what `lower` returned for the model.
        batches: images, float32 (batch, channels, height, width).
        progress: called with the number of images done, and 0 for the unknown total.
    """
    counts: dict[str, list[int]] = {}
    interpreter, done = Interpreter(program).to(next(model.parameters()).device), 0
    exact = ExactSimulation(model)
    for images in batches:
        for part in images.split(_AT_ONCE):
            with torch.inference_mode():
                _count(exact, program, interpreter, part, counts)
            done += len(part)
            progress("codes of every site", done, 0)
    made_by = _makers(model)
    return [Flips(name, made_by[name], *numbers) for name, numbers in counts.items()]


def _count(
    exact: ExactSimulation,
    program: IntegerProgram,
    interpreter: Interpreter,
    images: Tensor,
    counts: dict[str, list[int]],
) -> None:
    constant = program.constants.keys() | {program.input}
    names = {name: register for name, register in program.codes.items() if register not in constant}
    held: dict[str, Tensor] = {}
    assert exact.input is not None
    taps = {register: lambda x, register=register: held.__setitem__(register, x) for register in set(names.values())}
    interpreter(exact.input.encode(images), taps)

    def compared(name: str, quantizer: Quantizer, x: Tensor) -> Tensor:
        if name not in names:
            return quantizer(x)
        codes = quantizer.codes_of(held[names[name]])
        difference = (quantizer.encode(x).to(torch.int64) - codes).abs()
        entry = counts.setdefault(name, [0, 0, 0])
        entry[0] += codes.numel()
        entry[1] += int((difference > 0).sum())
        entry[2] = max(entry[2], int(difference.max()))
        return quantizer.decode(codes, x.dtype)

    _Fed(exact.model.graph_module, compared).run(exact.input(images).double())


class _Fed(GraphInterpreter):
    """Runs a graph in which a function, called with name, quantizer and input, replaces every quantizer."""

    def __init__(self, module: Any, compared: Callable[[str, Quantizer, Tensor], Tensor]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self._compared = compared

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        called = self.fetch_attr(str(target))
        if isinstance(called, Quantizer):
            return self._compared(str(target).removeprefix("quantizers."), called, args[0])
        return called(*args, **kwargs)


def _makers(model: QuantizedModel) -> dict[str, str]:
    """What computes the codes of each value: `rescaling`, or the kind of an operation on codes."""
    operations = [each for each in model.graph_module.modules() if isinstance(each, IntegerOperation)]
    made_by = {id(operation.result): operation.kind for operation in operations}
    return {name: made_by.get(id(quantizer), RESCALING) for name, quantizer in model.quantizers.items()}

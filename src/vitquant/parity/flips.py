"""Codes that integers round otherwise than the simulation, counted where they arise."""

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
FLIPPED = 1e-3  # share of codes that a rescaling may round otherwise than the simulation does
_AT_ONCE = 4  # images whose every register is held


@dataclass(frozen=True)
class Flips:
    """Codes that the integers round otherwise than the simulation, when both are fed the same codes.

    Arguments:
        value: the quantized tensor, by name.
        made_by: `rescaling`, or the kind of the operation whose codes these are.
        codes: how many were compared.
        flipped: how many differ.
        largest: by how many steps at most.
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
        """Whether the promise holds: rescaling flips at most `FLIPPED` of the codes, or one, by a step; others none."""
        few = self.flipped <= max(1, FLIPPED * self.codes)
        return self.flipped == 0 or (self.made_by == RESCALING and few and self.largest <= 1)


def flipped_codes(
    model: QuantizedModel,
    program: IntegerProgram,
    batches: Iterable[Tensor],
    progress: Progress = silent,
) -> list[Flips]:
    """Which codes the integers round otherwise than the simulation does, site by site.

    The program runs, and the simulation beside it is fed the program's codes at every quantizer, so that a flipped
    code is counted where it arises and nowhere else. It runs in float64: float32 flips three codes of a million on
    its own, and of 16-bit codes one of a thousand.

    Arguments:
        model: calibrated.
        program: what `lower` made of it.
        batches: images, float32 (batch, channels, height, width).
        progress: told how many images are done, of 0 where that is not known.
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
    """Runs a graph, handing what every quantizer reads to a function that says what it gives."""

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
    """What computes the codes of every value: a rescaling, or an operation on codes."""
    operations = [each for each in model.graph_module.modules() if isinstance(each, IntegerOperation)]
    made_by = {id(operation.result): operation.kind for operation in operations}
    return {name: made_by.get(id(quantizer), RESCALING) for name, quantizer in model.quantizers.items()}

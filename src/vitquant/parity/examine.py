"""A model's forms beside each other: float, simulated, in integers, and as each runtime computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from vitquant.errors import LoweringError
from vitquant.lowering import lower
from vitquant.model import QuantizedModel
from vitquant.model.simulation import ExactSimulation
from vitquant.parity.comparison import Comparison, as_close_as, bit_exact, compare, same_classes
from vitquant.parity.flips import Flips, flipped_codes
from vitquant.program.instructions import IntegerProgram
from vitquant.progress import Progress, silent
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.on_images import OnImages, interpreted, quantization_of
from vitquant.runtime.products import exact_int64
from vitquant.tasks.classification import logits_of

_FED = 8  # images that are compared site by site
_FEW = 4  # images that the definition computes, which is slow


@dataclass(frozen=True)
class Form:
    """One way of computing a model.

    Arguments:
        name: for the report.
        run: codes of images to codes of logits when `on_codes`, else images to logits.
        exact: whether it has to be the integer program, bit for bit, or rounds the simulation in its own way.
    """

    name: str
    run: Callable[[Tensor], Any]
    exact: bool
    on_codes: bool = False


@dataclass(frozen=True)
class ParityReport:
    """What `examine` found.

    Arguments:
        comparisons: of whole outputs.
        flips: site by site; empty for a model that does not lower.
        refused: why it does not lower; empty when it does.
    """

    comparisons: tuple[Comparison, ...]
    flips: tuple[Flips, ...] = ()
    refused: str = ""

    @property
    def promised(self) -> bool:
        """Whether anything is promised: without an integer program and an export nothing is."""
        return bool(self.flips) or any(each.promise for each in self.comparisons)

    @property
    def broken(self) -> list[str]:
        """The promises that do not hold, in words."""
        forms = [f"{c.form} beside {c.beside}: {c.promise}" for c in self.comparisons if not c.kept]
        sites = [
            f"{f.value}: {f.share:.1e} of its codes flip, by {f.largest} at most" for f in self.flips if not f.kept
        ]
        return forms + sites


def examine(
    model: QuantizedModel,
    batches: Sequence[Tensor],
    forms: Sequence[Form] = (),
    float_model: Callable[[Tensor], Any] | None = None,
    progress: Progress = silent,
) -> ParityReport:
    """Run the forms of a model on the same images, and compare them.

    Arguments:
        model: calibrated.
        batches: images, float32 (batch, channels, height, width); gone through several times.
        forms: what was exported, besides the model itself and its integer program; in the processor's memory.
        float_model: what it was made from.
        progress: told which form is run, how many were, and how many there are.
    """
    told = count()
    total = 5 + (float_model is not None) + len(forms)

    def run_next(what: str) -> None:
        progress(what, next(told), total)

    run_next("simulation")
    single, floats, comparisons = run(model, batches), None, []
    usual = None
    if float_model is not None:
        run_next("float model")
        floats = run(float_model, batches)
        usual = compare("simulation", single, "float model", floats)
        comparisons.append(usual)
    try:
        program = lower(model)
    except LoweringError as reason:
        comparisons += [_rounding(form, run(form.run, batches), single, usual) for form in forms if not form.exact]
        comparisons += [_of_no_program(form) for form in forms if form.exact]
        return ParityReport(tuple(comparisons), refused=str(reason))
    run_next("simulation in float64")
    double = run(ExactSimulation(model), batches).float()  # its rounding is that of the codes in float32
    run_next("integer program")
    device = next(model.parameters()).device
    integers = run(interpreted(program).to(device), batches)
    comparisons.append(compare("simulation", single, "float64 simulation", double))
    comparisons.append(same_classes(compare("integer program", integers, "float64 simulation", double)))
    comparisons.append(compare("integer program", integers, "simulation", single))
    if floats is not None:
        comparisons.append(compare("integer program", integers, "float model", floats))
    for form in forms:
        run_next(form.name)
        if form.exact:
            comparisons += _exact(form, program, batches, integers)
        else:
            comparisons.append(_rounding(form, run(form.run, batches), single, usual))
    run_next("int64 definition")
    definition = Form("int64 definition", Interpreter(program, exact_int64), exact=True, on_codes=True)
    comparisons += _exact(definition, program, [batches[0][:_FEW]], integers[:_FEW])
    run_next("codes of every site")
    flips = flipped_codes(model, program, [batches[0][:_FED]])
    return ParityReport(tuple(comparisons), tuple(flips))


def _exact(form: Form, program: IntegerProgram, batches: Sequence[Tensor], expected: Tensor) -> Iterator[Comparison]:
    """A form beside the integer program, on images, and on codes that no image has."""
    on_images = OnImages(form.run, *quantization_of(program)) if form.on_codes else form.run
    logits = run(on_images, [images.cpu() for images in batches])
    yield bit_exact(compare(form.name, logits, "integer program", expected))
    if form.on_codes:
        interpreter = Interpreter(program)
        for name, codes in adversarial_codes(program).items():
            with torch.inference_mode():
                pair = form.run(codes), interpreter(codes)
            yield bit_exact(compare(f"{form.name}, {name}", pair[0], "integer program", pair[1]))


def _of_no_program(form: Form) -> Comparison:
    promise = "is of this model, which has no integer program"
    return Comparison(form.name, "integer program", 0, 0.0, 0.0, 0.0, 0.0, promise, kept=False)


def _rounding(form: Form, logits: Tensor, simulated: Tensor, usual: Comparison | None) -> Comparison:
    return as_close_as(compare(form.name, logits, "simulation", simulated), usual)


def run(form: Callable[[Tensor], Any], batches: Iterable[Tensor]) -> Tensor:
    """The logits that a form gives for all images, on the CPU."""
    with torch.inference_mode():
        return torch.cat([logits_of(form(images)).cpu() for images in batches])


def adversarial_codes(program: IntegerProgram, seed: int = 0) -> dict[str, Tensor]:
    """Images of codes that no photograph has: the smallest, the largest, and random ones; int64, a few of each."""
    first = program.registers[program.input]
    shape, (low, high) = first.shape[1:], first.limits
    random = torch.randint(low, high + 1, (2, *shape), generator=torch.Generator().manual_seed(seed))
    return {
        f"all {low}": torch.full((1, *shape), low),
        f"all {high}": torch.full((1, *shape), high),
        "random codes": random,
    }

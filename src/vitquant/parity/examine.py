"""Comparison of a model's forms: float, simulated, integer program, and exported files in their runtimes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from vitquant.errors import LoweringError, ModelError
from vitquant.lowering import lower
from vitquant.model import QuantizedModel
from vitquant.model.simulation import ExactSimulation
from vitquant.parity.comparison import Comparison, Outputs, Same, as_close_as, bit_exact, compare, same_answers
from vitquant.parity.flips import Flips, flipped_codes
from vitquant.program.instructions import IntegerProgram
from vitquant.progress import Progress, silent
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.on_images import OnImages, interpreted, quantization_of
from vitquant.runtime.outputs import named
from vitquant.runtime.products import exact_int64

_FED = 8  # images whose codes are compared site by site
_FEW = 4  # images for the int64 definition, which is slow


@dataclass(frozen=True)
class Form:
    """One way of computing a model.

    Arguments:
        name: for the report.
        run: maps codes of images to codes of outputs if `on_codes`, else images to outputs.
        exact: whether it must equal the integer program bit for bit; otherwise it is a simulation whose rounding may
            differ.
    """

    name: str
    run: Callable[[Tensor], Any]
    exact: bool
    on_codes: bool = False


@dataclass(frozen=True)
class ParityReport:
    """The result of `examine`.

    Arguments:
        comparisons: of the forms' outputs.
        flips: comparisons of codes site by site; empty for a model that cannot be lowered.
        refused: why the model cannot be lowered; empty if it can.
    """

    comparisons: tuple[Comparison, ...]
    flips: tuple[Flips, ...] = ()
    refused: str = ""

    @property
    def promised(self) -> bool:
        """Whether there is any criterion to meet: there is none without an integer program and without exports."""
        return bool(self.flips) or any(each.promise for each in self.comparisons)

    @property
    def broken(self) -> list[str]:
        """The criteria that are not met, in words."""
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
    same: Same | None = None,
) -> ParityReport:
    """Run the forms of a model on the same images, and compare them.

    Arguments:
        model: calibrated.
        batches: images, float32 (batch, channels, height, width); iterated over several times.
        forms: exported files, to be compared beside the model itself and its integer program; they run on the CPU.
        float_model: the model that was quantized.
        progress: called with the form that is run, how many are done, and how many there are.
        same: maps the outputs of two forms to the images with the same answer, see `Task.same`. If given, nearly all
            answers of the integer program must be those of the float64 simulation; else its outputs may differ no
            more than rounding explains.

    Raises:
        ModelError: the outputs of a form are not those of the model.
    """
    told = count()

    def beside(form: str, found: Outputs, reference: str, expected: Outputs) -> Comparison:
        return compare(form, found, reference, expected, same)

    def run(form: Callable[[Tensor], Any], batches: Sequence[Tensor]) -> Outputs:
        return outputs_of(form, model, batches)

    total = 5 + (float_model is not None) + len(forms)

    def run_next(what: str) -> None:
        progress(what, next(told), total)

    run_next("simulation")
    single, floats, comparisons = run(model, batches), None, []
    usual = None
    if float_model is not None:
        run_next("float model")
        floats = run(float_model, batches)
        usual = beside("simulation", single, "float model", floats)
        comparisons.append(usual)
    try:
        program = lower(model)
    except LoweringError as reason:
        rounding = [(form.name, run(form.run, batches)) for form in forms if not form.exact]
        comparisons += [as_close_as(beside(name, found, "simulation", single), usual) for name, found in rounding]
        comparisons += [_of_no_program(form) for form in forms if form.exact]
        return ParityReport(tuple(comparisons), refused=str(reason))
    run_next("simulation in float64")
    exact = run(ExactSimulation(model), batches)
    double = {name: each.float() for name, each in exact.items()}  # rounded to float32 like the outputs of the program
    run_next("integer program")
    device = next(model.parameters()).device
    integers = run(interpreted(program).to(device), batches)
    comparisons.append(beside("simulation", single, "float64 simulation", double))
    rounded = beside("integer program", integers, "float64 simulation", double)
    comparisons.append(as_close_as(rounded, usual) if same is None else same_answers(rounded))
    comparisons.append(beside("integer program", integers, "simulation", single))
    if floats is not None:
        comparisons.append(beside("integer program", integers, "float model", floats))
    for form in forms:
        run_next(form.name)
        if form.exact:
            comparisons += _exact(form, model, program, batches, integers, same)
        else:
            comparisons.append(as_close_as(beside(form.name, run(form.run, batches), "simulation", single), usual))
    run_next("int64 definition")
    definition = Form("int64 definition", Interpreter(program, exact_int64), exact=True, on_codes=True)
    few = {name: each[:_FEW] for name, each in integers.items()}
    comparisons += _exact(definition, model, program, [batches[0][:_FEW]], few, same)
    run_next("codes of every site")
    flips = flipped_codes(model, program, [batches[0][:_FED]])
    return ParityReport(tuple(comparisons), tuple(flips))


def _exact(
    form: Form,
    model: QuantizedModel,
    program: IntegerProgram,
    batches: Sequence[Tensor],
    expected: Outputs,
    same: Same | None,
) -> Iterator[Comparison]:
    """Compare a form with the integer program on images, and on codes that no image has."""
    on_images = OnImages(form.run, *quantization_of(program)) if form.on_codes else form.run
    found = outputs_of(on_images, model, [images.cpu() for images in batches])
    yield bit_exact(compare(form.name, found, "integer program", expected, same))
    if form.on_codes:
        interpreter = Interpreter(program)
        for name, codes in adversarial_codes(program).items():
            with torch.inference_mode():
                pair = (named(run(codes), program.outputs) for run in (form.run, interpreter))
            yield bit_exact(compare(f"{form.name}, {name}", next(pair), "integer program", next(pair), same))


def _of_no_program(form: Form) -> Comparison:
    promise = "is of this model, which has no integer program"
    return Comparison(form.name, "integer program", 0, None, 0.0, 0.0, 0.0, promise, kept=False)


def outputs_of(form: Callable[[Tensor], Any], model: QuantizedModel, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """The outputs of a form of a model for all images, by name, on the CPU.

    Raises:
        ModelError: these are not the outputs of the model, or their first axis is not the batch.
    """
    parts: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for images in batches:
            for name, part in model.named_outputs(form(images)).items():
                if part.shape[:1] != (len(images),):
                    raise ModelError(
                        f"the model gives {name!r} of shape {list(part.shape)} for {len(images)} images; forms are "
                        "compared image by image: let its first axis be the images"
                    )
                parts.setdefault(name, []).append(part.cpu())
    return {name: torch.cat(each) for name, each in parts.items()}


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

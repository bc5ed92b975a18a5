"""The model, the images and the float outputs of a landscape."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from vitquant.calibration_data import Batch, CalibrationData
from vitquant.errors import CalibrationError, RecipeError
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.loss_landscape.evaluation import References, Same
from vitquant.lowering import check_possible
from vitquant.methods.context import Context
from vitquant.methods.contract import Phase
from vitquant.methods.float_outputs import FloatOutputs
from vitquant.methods.running import check_gradients, run_steps
from vitquant.methods.scale_evolution import EvolveScalesSettings, check_evolution, evolving_names
from vitquant.methods.table import Step, passes, planned
from vitquant.model import QuantizedModel
from vitquant.progress import Progress
from vitquant.recipe import Bits, Recipe
from vitquant.recipe.library import overlaid
from vitquant.tasks.task import task_of
from vitquant.unwrapping import unwrapped
from vitquant.work import WorkDirectory, WorkState

METHOD, OVERLAY = "evolve-scales", "evolved-scales"


@dataclass(frozen=True)
class Images:
    """The calibration images, then those held out."""

    calibration: CalibrationData
    held_out: CalibrationData

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.calibration
        yield from self.held_out


@dataclass(frozen=True)
class Subject:
    """A model that is quantized, its operations in float, and what its outputs are compared with.

    Arguments:
        model: by the recipe without `evolve-scales`; it has no quantizers before `quantized`.
        steps: that quantize it; what it has to do in integers is not among them.
        settings: of the evolution of one block of it.
        context: of methods, with the calibration images and the float model.
        images: of the calibration, and held out.
        references: the float model's outputs for them.
    """

    model: QuantizedModel
    steps: Sequence[Step]
    settings: EvolveScalesSettings
    context: Context
    images: Images
    references: References


def evolution_settings(recipe: Recipe) -> EvolveScalesSettings:
    """The settings of a recipe's `evolve-scales`, or for a recipe without it those of the overlay `evolved-scales`.

    Raises:
        RecipeError: a setting is unknown or out of range.
    """
    evolving = recipe if _evolves(recipe) else overlaid(recipe, OVERLAY)
    return next(step.settings for step in planned(evolving) if step.name == METHOD)


def subject_of(
    model: nn.Module,
    recipe: Recipe,
    bits: Bits,
    data: Iterable[Batch],
    held_out: Iterable[Batch],
    settings: EvolveScalesSettings,
    block: int | None,
    integers: bool,
    seed: int,
    progress: Progress,
    memory: float,
) -> Subject:
    """Prepare a model to be quantized, with all checks, and the float model's outputs.

    Arguments:
        model, recipe, data, held_out, block, seed, progress, memory: see `landscape`.
        bits: the widths for the recipe's symbols.
        settings: of the evolution, for all blocks.
        integers: whether the model has to lower to integers.

    Raises:
        VitquantError: see `landscape`.
    """
    model = unwrapped(model)
    device = next((parameter.device for parameter in model.parameters()), None)
    images = Images(CalibrationData(data, device), CalibrationData(held_out, device))
    example = images.calibration.example
    shape = (int(example.shape[1]), int(example.shape[2]), int(example.shape[3]))
    if images.held_out.example.shape[1:] != example.shape[1:]:
        found = "x".join(map(str, images.held_out.example.shape[1:]))
        raise CalibrationError(f"the held-out images are {found}, and the others {'x'.join(map(str, shape))}")
    deployed = replace(recipe, methods=tuple(each for each in recipe.methods if each.name != METHOD))
    steps = [step for step in planned(deployed) if step.definition.phase < Phase.INTEGERS]
    captured = CapturedModel(capture(model, example), shape)
    check_gradients(captured, example, steps)
    teacher = copy.deepcopy(captured)
    quantized = QuantizedModel(captured, deployed, bits)
    for step in steps:
        step.check(quantized)
    settings = _of_one_block(quantized, settings, block, _evolves(recipe))
    check_evolution(quantized, settings)
    images.calibration.check(passes(steps, quantized) + 2, any(step.definition.needs.labels for step in steps))
    images.held_out.check(2, labels=False)
    if integers:
        check_possible(captured, deployed, bits)
    task = task_of(model, teacher.outputs)
    references = _references(teacher, images, settings.loss, task.same)
    context = Context(
        images.calibration,
        images.calibration.labelled(),
        task.errors(teacher.outputs),
        task.logits(teacher.outputs),
        teacher,
        seed,
        progress,
        memory,
    )
    return Subject(quantized, steps, settings, context, images, references)


def quantized(subject: Subject, work: WorkDirectory | None) -> Subject:
    """Quantize the model, which is changed in place.

    Arguments:
        subject: from `subject_of`.
        work: where its state is saved, and what is measured; None saves nothing.

    Raises:
        VitquantError: see `quantize`.
    """
    run_steps(subject.model, subject.steps, subject.context, work)
    return replace(subject, context=replace(subject.context, work=WorkState(work, "landscape")))


def _evolves(recipe: Recipe) -> bool:
    return any(each.name == METHOD for each in recipe.methods)


def _of_one_block(
    model: QuantizedModel, settings: EvolveScalesSettings, block: int | None, named: bool
) -> EvolveScalesSettings:
    """The settings for one block, of all its sites if they match none and the recipe does not name them itself."""
    settings = replace(settings, blocks=() if block is None else (block,))
    check = replace(settings, sites=("*",), parameters=("scale",)) if not named else settings
    check_evolution(model, check)
    try:
        names = evolving_names(model, settings)
    except RecipeError:
        if named:
            raise
        settings = replace(settings, sites=("*",))
        names = evolving_names(model, settings)
    return replace(settings, blocks=(max(names),))


def _references(teacher: CapturedModel, images: Images, loss: str, same: Same | None) -> References:
    outputs_of = FloatOutputs(teacher, loss)
    outputs: list[tuple[Tensor, ...]] = []
    calibration = 0
    for name, batches in (("calibration", images.calibration), ("held-out", images.held_out)):
        for number, batch in enumerate(batches, 1):
            outputs.append(outputs_of(batch, f"{name} batch {number}"))
            calibration += name == "calibration"
    return References(outputs, [len(each[0]) for each in outputs], calibration, tuple(teacher.outputs), same)

"""The loss of a quantized model along random and searched lines through the scales of one of its blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from vitquant.autocast import in_own_precision
from vitquant.calibration_data import Batch, RepeatedBatches
from vitquant.errors import RecipeError
from vitquant.loss_landscape.evaluation import Evaluation
from vitquant.loss_landscape.kept_numbers import KeptNumbers
from vitquant.loss_landscape.lines import random_line, searched_line
from vitquant.loss_landscape.subject import Subject, evolution_settings, quantized, subject_of
from vitquant.loss_landscape.survey import Survey
from vitquant.loss_landscape.table import INTEGERS, SEARCHED, SIMULATION, Landscape
from vitquant.lowering.promise import promised
from vitquant.lowering.recomputed_program import RecomputedProgram
from vitquant.methods.evolving_block import EvolvingBlock
from vitquant.methods.recomputed import Recompute, RecomputedSimulation
from vitquant.methods.scale_evolution import evolving_blocks
from vitquant.model.saved import float_digest
from vitquant.objectives.output_loss import OUTPUT_LOSSES
from vitquant.progress import Progress, silent
from vitquant.recipe import Recipe, requested
from vitquant.recipe.override import Settings
from vitquant.schema import nearest
from vitquant.work import WorkDirectory

_MOST = 10_000  # points, lines and children


@in_own_precision
def landscape(
    model: nn.Module,
    recipe: str | Recipe,
    data: Iterable[Batch],
    held_out: Iterable[Batch],
    *,
    bits: str | None = None,
    settings: Settings = (),
    block: int | None = None,
    reach: float = 0.05,
    points: int = 41,
    directions: int = 2,
    cycles: int = 60,
    loss: str | None = None,
    simulated: bool = False,
    seed: int = 0,
    progress: Progress = silent,
    memory: float = 4.0,
    work: str | Path | None = None,
) -> Landscape:
    """Quantize a model, and measure its loss along lines through the scales of one block; the model is not changed.

    The lines are random ones, and the one from the scales as they were quantized to those that a search of the block
    found. The recipe's `evolve-scales` says which scales change, and how they are searched; for a recipe without it,
    the overlay `evolved-scales` does, or all weights of the block change where that names none of it. The model is
    quantized without that method. In the simulation softmax, norms and activations are in float, as in that search.

    Arguments:
        model, recipe, bits, settings, seed, progress: as for `quantize`.
        data: calibration batches, as for `quantize`, which the search sees too. They are read several times.
        held_out: batches of other images, by which nothing is chosen.
        block: its number; the last one with such scales when None.
        reach: how far a scale moves along a random line, as a share of it; above 0 and below 1.
        points: on each line, at least 3; where t = 0 is not among them, or t = 1 of the searched line, it is added.
        directions: the number of random lines.
        cycles: the number of children of the search; 0 leaves it out.
        loss: one of `OUTPUT_LOSSES`; the recipe's when None, `infonce` for recipes without `evolve-scales`.
        simulated: measure the simulation alone even if the recipe promises integers, and search by it.
        memory: gigabytes for the tensors in front of the block, and for the recipe's methods; the result does not
            depend on it.
        work: a directory in which what is done is saved: after an interruption the same call continues there. It can
            be removed afterwards.

    Raises:
        RecipeError: a number is out of range, the loss is unknown, or there is no such block or nothing in it to move.
        CalibrationError: no images; a batch of one image, for `infonce`; the batches are others each time, or can be
            read once only; or the quantized model gives no finite loss.
        LoweringError: the recipe promises integers, and the model cannot be lowered.
        CheckpointError: the work directory belongs to another run, or what it holds is damaged.
        VitquantError: see `quantize`.

    Source: Evol-Q, Frumkin et al. 2023, the figure of the loss landscape. docs/landscape.md.
    """
    check_numbers(reach, points, directions, cycles, loss, memory)
    whole, widths = requested(recipe, bits, settings)
    evolution = evolution_settings(whole)
    if loss is not None:
        evolution = replace(evolution, loss=loss)
    why = "as asked for" if simulated else ""
    if not simulated and promised(whole) is None:
        why = f"{whole.name} leaves operations in float; +fully-integer, laid over it, puts them into integers"
    if simulated:
        evolution = replace(evolution, fitness=SIMULATION)
    subject = subject_of(model, whole, widths, data, held_out, evolution, block, not why, seed, progress, memory)
    images = subject.images
    about = {
        "recipe": whole.name,
        "bits": str(widths),
        "reach": reach,
        "seed": seed,
        "calibration": {"images": images.calibration.images, "sha256": images.calibration.digest},
        "held_out": {"images": images.held_out.images, "sha256": images.held_out.digest},
    }
    run = {
        **about,
        "model": float_digest(subject.model),
        "recipe": subject.model.recipe.to_dict(),
        "evolution": asdict(subject.settings),
        "survey": {"points": points, "directions": directions, "cycles": cycles},
        "form": "simulation" if why else "simulation and integers",
    }
    of_inference = any(each.is_inference() for each in subject.model.parameters())  # as in `evolve_scales`
    with ExitStack() as held:
        kept = None if work is None else held.enter_context(WorkDirectory.opened(work, run))
        subject = quantized(subject, kept)
        held.enter_context(torch.inference_mode(of_inference))
        held.enter_context(torch.no_grad())
        return replace(surveyed(subject, reach, points, directions, cycles, not why), simulated=why, about=about)


def surveyed(subject: Subject, reach: float, points: int, directions: int, cycles: int, integers: bool) -> Landscape:
    """The landscape of one block of a quantized model, which is left as it was.

    Arguments:
        subject: the model, and what it is compared with.
        reach, points, directions, cycles: see `landscape`.
        integers: whether to measure the integer program, too.

    Raises:
        CalibrationError, LoweringError, CheckpointError: see `landscape`.
    """
    settings, context = subject.settings, subject.context
    ((number, block),) = evolving_blocks(subject.model, context, settings).items()
    genes = block.genes(*settings.reach)
    drawn = [context.generator(f"landscape {place}") for place in range(1, directions + 1)]
    lines = [random_line(f"random {place}", genes, reach, points, each) for place, each in enumerate(drawn, 1)]
    unsearched = searched_line(SEARCHED, genes, genes.start, points)
    asked = [*lines, *([unsearched] if cycles else [])]
    forms = _forms(subject, number, block, integers)
    total = cycles + len(forms) * sum(len(each.positions) for each in asked)
    survey = Survey(genes, forms, KeptNumbers(context.work), context, total)
    found = None
    try:
        if cycles:
            best, found = survey.search(settings, cycles)
            lines.append(searched_line(SEARCHED, genes, best, points))
        measured = survey.measure(lines)
    finally:
        survey.leave()
    return Landscape(number, tuple(block.quantizers), len(genes.start), settings.loss, measured, found)


def _forms(subject: Subject, number: int, block: EvolvingBlock, integers: bool) -> dict[str, Evaluation]:
    """The forms of the model, each with its share of the memory."""
    recomputes: dict[str, Recompute] = {SIMULATION: RecomputedSimulation}
    if integers:
        recomputes[INTEGERS] = RecomputedProgram
    references, data = subject.references, RepeatedBatches(subject.images)
    held = sum(each.nbytes for batch in references.outputs for each in batch)
    memory = max(subject.context.memory * 1e9 - held, 0.0) / len(recomputes)
    changing = {number: block.changing}
    return {
        name: Evaluation(
            block,
            number,
            recompute(subject.model, data, references.sizes, changing, memory),
            references,
            subject.settings.loss,
        )
        for name, recompute in recomputes.items()
    }


def check_numbers(
    reach: float, points: int, directions: int, cycles: int, loss: str | None = None, memory: float = 4.0
) -> None:
    """Refuse numbers that are out of range, and unknown losses.

    Arguments:
        reach, points, directions, cycles, loss, memory: of `landscape`.

    Raises:
        RecipeError: one of them is refused.
    """
    if not 0 < reach < 1:
        raise RecipeError(f"reach = {reach}: it is above 0 and below 1, since a scale times 1 - reach is positive")
    for name, number, least in (("points", points, 3), ("directions", directions, 0), ("cycles", cycles, 0)):
        if not isinstance(number, int) or not least <= number <= _MOST:
            raise RecipeError(f"{name} = {number}: it is a whole number from {least} to {_MOST:,}")
    if not directions and not cycles:
        raise RecipeError("directions = 0 and cycles = 0 leave nothing to measure: give one of them")
    if loss is not None and loss not in OUTPUT_LOSSES:
        raise RecipeError(f"loss = {loss!r} is unknown; {nearest(loss, OUTPUT_LOSSES)}")
    if not 0 < memory < math.inf:
        raise RecipeError(f"memory = {memory}: it is positive, in gigabytes")

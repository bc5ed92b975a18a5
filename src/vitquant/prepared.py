"""A float model and its calibration images, from their names; images can be made for the model, too."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from vitquant.errors import DataError
from vitquant.image_folders import CalibrationImages
from vitquant.progress import Progress, silent
from vitquant.recipe import Recipe
from vitquant.synthesis.noise import NOISES
from vitquant.synthetic_images import USUAL, SyntheticImages, check_synthesis, synthesize
from vitquant.tasks.images import ImageBatches
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.zoo import ModelSource, check_name, create, parse_model_arguments, pinned, preprocessing_of

SYNTHETIC = "synthetic"  # instead of a directory
USUAL_COUNT = 32  # of images that are made where no number is asked for, as published


@dataclass(frozen=True)
class Synthetic:
    """Calibration images that are made for the model.

    Arguments:
        method: see `synthesize`.
        settings: KEY=VALUE each.
    """

    method: str = USUAL
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join((f"{SYNTHETIC}:{self.method}", *self.settings))


def calibration_named(text: str, settings: Sequence[str] = ()) -> Path | Synthetic:
    """What a user names to calibrate on: a directory, or `synthetic`, or `synthetic:METHOD`.

    Arguments:
        text: the name.
        settings: of the synthesis, KEY=VALUE each.

    Raises:
        RecipeError: there is no such method or setting.
        DataError: settings, and nothing is made; or a word that is nearly `synthetic`, and no directory.
    """
    word, _, method = text.partition(":")
    if word != SYNTHETIC:
        if settings:
            raise DataError(f"{settings[0]}: settings of a synthesis are for {SYNTHETIC}, not for a directory, {text}")
        if get_close_matches(word, [SYNTHETIC]) and not os.path.lexists(text):
            raise DataError(f"{text}: no such directory; did you mean {SYNTHETIC}?")
        return Path(text)
    made = Synthetic(method or USUAL, tuple(settings))
    check_synthesis(1, made.method, made.settings)
    return made


def takes_no_settings(text: str) -> bool:
    """Whether settings of a synthesis mean nothing for what a user names: a directory, or noise."""
    word, _, method = text.partition(":")
    return word != SYNTHETIC or method in NOISES


@dataclass(frozen=True)
class Request:
    """A model and its calibration images, as a user names them.

    Arguments:
        model: its name, see `zoo.ModelSource`.
        calibration: a directory of images, or how they are made.
        weights, weights_key: `pretrained`, `random` or a file, and where in the file they are.
        images, batch: how many, and how many at a time; the recipe's numbers when None.
        preprocessing: a file whose keys are laid over the model's own.
        model_arguments: KEY=VALUE each.
        seed: of random weights and of the choice of images.
        image_workers: how many processes decode images.
        skip_bad_images: whether to leave out those that cannot be read.
        held_out: how many other images of the directory to hold out.
    """

    model: str
    calibration: Path | Synthetic
    weights: str
    weights_key: str | None
    images: int | None
    batch: int | None
    preprocessing: Path | None
    model_arguments: list[str] | None
    seed: int
    image_workers: int
    skip_bad_images: bool
    held_out: int = 0


@dataclass(frozen=True)
class NamedModel:
    """A float model that was built from its name.

    Arguments:
        network: the model, on its device.
        source: the source of the model.
        steps: the preprocessing of its images.
        notes: remarks for the user about its weights.
    """

    network: nn.Module
    source: ModelSource
    steps: Preprocessing
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """A float model and its calibration images.

    Arguments:
        network: the model, on its device.
        source: the source of the model.
        steps: the preprocessing of its images.
        data: the images, in batches.
        chosen: the number of chosen images, including those that cannot be read.
        batch: the number of images in a batch.
        notes: remarks for the user about the images and the weights.
        held_out: the images that are held out, in batches; None where none are.
        origin: where the images come from, for the saved model: their directory, or how they were made.
        folder: holds the images that were made, and is removed with it.
        seconds: that making them took.
    """

    network: nn.Module
    source: ModelSource
    steps: Preprocessing
    data: ImageBatches
    chosen: int
    batch: int
    notes: tuple[str, ...]
    held_out: ImageBatches | None
    origin: dict[str, Any]
    folder: TemporaryDirectory[str] | None = None
    seconds: float = 0.0


def named_source(
    name: str, weights: str, weights_key: str | None, model_arguments: list[str] | None, seed: int
) -> ModelSource:
    """The source of a model, checked as far as that needs neither weights nor images; arguments as of `Request`.

    Raises:
        ModelError: there is no such model, or an argument is none.
    """
    if weights not in ("pretrained", "random"):
        weights = str(Path(weights).absolute())  # it is saved, and `evaluate` may run in another directory
    named = ModelSource(name, parse_model_arguments(model_arguments or ()), weights, seed, weights_key=weights_key)
    check_name(named)
    return named


def built(named: ModelSource, preprocessing: Path | None, where: torch.device) -> NamedModel:
    """Build a model with its weights.

    Arguments:
        named: from `named_source`.
        preprocessing: a file whose keys are laid over the model's own.
        where: the device.

    Raises:
        VitquantError: the model, its weights or its preprocessing are not available.
    """
    torch.manual_seed(named.seed)
    source = pinned(named)
    notes: list[str] = []
    network = create(source, notes.append).to(where)
    return NamedModel(network, source, preprocessing_of(network, source, preprocessing), tuple(notes))


@dataclass(frozen=True)
class Effort:
    """What making images may take.

    Arguments:
        memory, time_limit, progress: see `synthesize`.
        work: the work directory of what the images are for, in which the state of making them is saved, too.
    """

    memory: float = 4.0
    time_limit: float = math.inf
    progress: Progress = silent
    work: Path | None = None


def images_for(model: NamedModel, how: Synthetic, count: int, seed: int, effort: Effort) -> SyntheticImages:
    """Images that are made for a model.

    Raises:
        VitquantError: see `synthesize`.
    """
    return synthesize(
        model.network,
        count,
        how.method,
        settings=how.settings,
        preprocessing=model.steps.to_dict(),
        seed=seed,
        progress=effort.progress,
        memory=effort.memory,
        time_limit=effort.time_limit,
        work=None if effort.work is None else effort.work / f".{SYNTHETIC}",
    )


def check_count(request: Request) -> int:
    """How many images are made for a request.

    Raises:
        RecipeError: too many.
        DataError: fewer than in a batch.
    """
    count = (request.images or USUAL_COUNT) + request.held_out
    check_synthesis(count, USUAL, ())
    if request.batch is not None and request.batch > count - request.held_out:
        raise DataError(f"--batch {request.batch}: {count - request.held_out} images are made; give --images or less")
    return count


def prepare(
    request: Request,
    recipe: Recipe,
    where: torch.device,
    check: Callable[[nn.Module, tuple[int, int, int]], None] | None = None,
    effort: Effort = Effort(),
) -> Prepared:
    """Build the model and choose the images, or make them, with all checks before any long work.

    Arguments:
        request: what the user names.
        recipe: says how many images of a directory.
        where: the device of the model.
        check: refuses a model and the size of its images, before images are made for it.
        effort: what making images may take.

    Raises:
        VitquantError: the model, weights, images or preprocessing are not available, or images cannot be made.
    """
    named = named_source(request.model, request.weights, request.weights_key, request.model_arguments, request.seed)
    how = request.calibration
    if isinstance(how, Synthetic):
        count = check_count(request)
        model = built(named, request.preprocessing, where)
        if check is not None:
            check(model.network, model.steps.input_size)
        started = time.monotonic()
        images = images_for(model, how, count, request.seed, effort)
        seconds = time.monotonic() - started
        folder = TemporaryDirectory(prefix="vitquant-")
        images.write_into(Path(folder.name))
        there = len(images) - request.held_out  # fewer than asked for, if the time limit came first
        asked = None if request.images is None else min(request.images, there)
        chosen = _chosen(replace(request, images=asked), Path(folder.name), recipe)
        about = {key: value for key, value in images.about.items() if key not in ("losses", "preprocessing")}
        notes = (f"the time limit came while images were made: {images.cut_short}",) if images.cut_short else ()
        origin: dict[str, Any] = {SYNTHETIC: about}
    else:
        chosen, folder, notes, seconds = _chosen(request, how, recipe), None, (), 0.0
        model = built(named, request.preprocessing, where)
        origin = {"directory": str(how.absolute())}
    reading = (request.image_workers, request.skip_bad_images)
    data = chosen.batches(model.steps, *reading)
    held_out = chosen.held_out_batches(model.steps, *reading) if request.held_out else None
    return Prepared(
        model.network,
        model.source,
        model.steps,
        data,
        len(chosen.items),
        chosen.batch,
        (*model.notes, *notes, *chosen.notes),
        held_out,
        origin,
        folder,
        seconds,
    )


def _chosen(request: Request, directory: Path, recipe: Recipe) -> CalibrationImages:
    return CalibrationImages.chosen(directory, recipe, request.images, request.batch, request.seed, request.held_out)

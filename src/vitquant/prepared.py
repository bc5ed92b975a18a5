"""A float model and its calibration images, from their names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vitquant.image_folders import CalibrationImages
from vitquant.recipe import Recipe
from vitquant.tasks.images import ImageBatches
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.zoo import ModelSource, check_name, create, parse_model_arguments, pinned, preprocessing_of


@dataclass(frozen=True)
class Request:
    """A model and its calibration images, as a user names them.

    Arguments:
        model: its name, see `zoo.ModelSource`.
        calibration: a directory of images.
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
    calibration: Path
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
    """

    network: nn.Module
    source: ModelSource
    steps: Preprocessing
    data: ImageBatches
    chosen: int
    batch: int
    notes: tuple[str, ...]
    held_out: ImageBatches | None = None


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


def prepare(request: Request, recipe: Recipe, where: torch.device) -> Prepared:
    """Build the model and choose the images, with all checks before any long work.

    Raises:
        VitquantError: the model, weights, images or preprocessing are not available.
    """
    named = named_source(request.model, request.weights, request.weights_key, request.model_arguments, request.seed)
    chosen = CalibrationImages.chosen(
        request.calibration, recipe, request.images, request.batch, request.seed, request.held_out
    )
    model = built(named, request.preprocessing, where)
    reading = (request.image_workers, request.skip_bad_images)
    data = chosen.batches(model.steps, *reading)
    held_out = chosen.held_out_batches(model.steps, *reading) if request.held_out else None
    notes = (*model.notes, *chosen.notes)
    return Prepared(model.network, model.source, model.steps, data, len(chosen.items), chosen.batch, notes, held_out)

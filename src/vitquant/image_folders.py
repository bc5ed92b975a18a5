"""The images of a directory as a model takes them: to calibrate on, to evaluate on, and to compare forms on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from vitquant.errors import DataError
from vitquant.model import QuantizedModel
from vitquant.recipe import Recipe
from vitquant.tasks.classes import ClassNames, refuse_features
from vitquant.tasks.classes_file import read_classes
from vitquant.tasks.classification import check_classifier, class_count
from vitquant.tasks.images import (
    ImageBatches,
    Item,
    Listing,
    batches,
    check_labels,
    load_listing,
    load_unlabelled,
    subset,
)
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.tasks.task import Task
from vitquant.zoo import ModelSource, architecture, class_names

_COMPARED = 8  # images in a batch


@dataclass(frozen=True)
class CalibrationImages:
    """Images that were chosen to calibrate on; none of them is read yet.

    Arguments:
        directory: that they were chosen from.
        items: the chosen ones, in the order in which they are read.
        batch: how many in one.
        at_least: how many there must be of them that can be read.
        notes: how they were found, one line each.
        held_out: other images of the directory, by which nothing is to be chosen.
    """

    directory: Path
    items: tuple[Item, ...]
    batch: int
    at_least: int
    notes: tuple[str, ...]
    held_out: tuple[Item, ...] = ()

    @classmethod
    def chosen(
        cls,
        directory: str | Path,
        recipe: Recipe,
        images: int | None = None,
        batch: int | None = None,
        seed: int = 0,
        held_out: int = 0,
    ) -> CalibrationImages:
        """Choose images of a directory at random; labels are not read.

        Arguments:
            directory: see `tasks.images.load_unlabelled`.
            recipe: says how many where that is not asked for; all there are where these are fewer.
            images: how many.
            batch: how many in one batch; the recipe's number, or all images where those are fewer, when None.
            seed: of the choice.
            held_out: how many others to hold out; the images to calibrate on are the same whatever it is.

        Raises:
            DataError: there are no images, fewer than are asked for, or fewer than in a batch that is asked for.
        """
        listing = load_unlabelled(directory)
        free = len(listing) - held_out
        others = f" and {held_out} to hold out" if held_out else ""
        if free < (images or 1):
            asked = f"{directory}: {images or 1} images{others} asked for, {len(listing)} there"
            raise DataError(f"{asked}; give --images {free} or less" if free > 0 else f"{asked}; hold out fewer")
        count = images or min(recipe.calibration.images, free)
        items = subset(listing, count + held_out, seed)
        size = batch or min(recipe.calibration.batch, count)
        found = cls(Path(directory), tuple(items[:count]), size, batch or 1, listing.notes, tuple(items[count:]))
        found._refuse_less_than_a_batch(count)
        return found

    def batches(self, preprocessing: Preprocessing, workers: int = 0, skip_bad_images: bool = False) -> ImageBatches:
        """The images in batches, see `tasks.images.batches`.

        Raises:
            DataError: too few of them can be read.
        """
        found = batches(self.items, preprocessing, self.batch, workers, skip_bad_images)
        self._refuse_less_than_a_batch(len(found.items))
        return found

    def held_out_batches(
        self, preprocessing: Preprocessing, workers: int = 0, skip_bad_images: bool = False
    ) -> ImageBatches:
        """The images that are held out, in batches of the same size, see `tasks.images.batches`.

        Raises:
            DataError: none of them can be read.
        """
        return batches(self.held_out, preprocessing, self.batch, workers, skip_bad_images)

    def _refuse_less_than_a_batch(self, count: int) -> None:
        if count < self.at_least:
            raise DataError(
                f"{self.directory}: {count} calibration images are less than a batch of {self.at_least}; give more, or "
                f"--batch {count}"
            )


def evaluation_images(
    directory: str | Path,
    model: QuantizedModel,
    task: Task,
    float_model: nn.Module | None = None,
    classes: str | Path | None = None,
) -> Listing:
    """The images of a directory to evaluate a model on, with labels where its task has them.

    Arguments:
        directory: see `tasks.images.load_listing`.
        model: whose classes the labels are.
        task: from `workflows.task_for`.
        float_model: what it was made from, if that is there; its library names its classes.
        classes: a file that says which class a folder is, see `tasks.classes_file`.

    Raises:
        ModelError: a classifier's outputs are no logits.
        DataError: no directory of such images; or a file of classes for a task without them.
    """
    if not task.labelled:
        if classes is not None:
            raise DataError(f"{classes}: the task {task.name} has no classes; leave --classes out")
        return load_unlabelled(directory)
    check_classifier(model, model.outputs)
    count = class_count(model.outputs)
    assert count is not None
    items = load_listing(directory, _classes(model, float_model, count, classes))
    check_labels(items, count)
    return items


def comparison_images(
    model: QuantizedModel,
    directory: str | Path | None = None,
    images: int = 64,
    preprocessing: Preprocessing | None = None,
) -> list[Tensor]:
    """A few images to compare the forms of a model on, in batches that are held in memory.

    Arguments:
        model: from `quantize` or `load`.
        directory: of images; when None the one that it was calibrated on.
        images: how many, or all there are where these are fewer.
        preprocessing: the model's own when None.

    Raises:
        DataError: there are no images, they cannot be read, or the model says no preprocessing.
    """
    if directory is None:
        calibration = model.provenance.get("calibration") or {}
        directory = calibration.get("directory")
        if directory is None or not os.path.isdir(directory):
            made = "were made for it, and are not kept; vitquant synthesize makes some to keep"
            which = made if "synthetic" in calibration else "are not there"
            raise DataError(f"the images that the model was calibrated on {which}; give --data DIR")
    items = load_unlabelled(directory)
    chosen = subset(items, min(images, len(items)), seed=0)
    return [tensor for tensor, _ in batches(chosen, preprocessing or preprocessing_for(model), _COMPARED)]


def preprocessing_for(model: QuantizedModel, file: str | Path | None = None) -> Preprocessing:
    """The preprocessing that was saved with a model, with the keys of a file laid over it.

    Raises:
        DataError: there is neither, the file is none of preprocessing, or the image size is another than the model's.
    """
    saved = model.provenance.get("preprocessing")
    if saved is None and file is None:
        raise DataError("the model was saved without its preprocessing; give --preprocessing FILE.toml")
    steps = Preprocessing() if saved is None else Preprocessing.from_dict(saved)
    if file is not None:
        steps = Preprocessing.from_toml(file, steps)
    if steps.input_size != model.input_shape:
        given, wanted = list(steps.input_size), list(model.input_shape)
        raise DataError(f"{file or 'preprocessing'}: input_size is {given}, the model takes {wanted}; set it so")
    return steps


def _classes(model: QuantizedModel, float_model: nn.Module | None, count: int, file: str | Path | None) -> ClassNames:
    """The model's classes: those of a file where one is given, else as its library names them."""
    path = None if file is None else Path(file)
    source = model.provenance.get("source")
    if source is None:
        return ClassNames(count) if path is None else read_classes(path, count)
    known = ModelSource.from_dict(source)
    named = architecture(known) if float_model is None else float_model
    refuse_features(named)
    return class_names(named, known, count) if path is None else read_classes(path, count)

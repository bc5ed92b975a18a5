"""Preprocessing, float model and labelled images for the evaluation of a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitquant.cli.terminal import Terminal
from vitquant.errors import DataError, ModelError, VitquantError

if TYPE_CHECKING:
    from torch import nn

    from vitquant.model import QuantizedModel
    from vitquant.tasks.classes import ClassNames
    from vitquant.tasks.images import Listing
    from vitquant.tasks.preprocessing import Preprocessing


def preprocessing_of(quantized: QuantizedModel, file: Path | None) -> Preprocessing:
    """The preprocessing that was saved with the model, overridden by the keys of a file."""
    from vitquant.tasks.preprocessing import Preprocessing

    saved = quantized.provenance.get("preprocessing")
    if saved is None and file is None:
        raise DataError("the model was saved without its preprocessing; give --preprocessing FILE.toml")
    steps = Preprocessing() if saved is None else Preprocessing.from_dict(saved)
    if file is not None:
        steps = Preprocessing.from_toml(file, steps)
    if steps.input_size != quantized.input_shape:
        given, wanted = list(steps.input_size), list(quantized.input_shape)
        raise DataError(f"{file or 'preprocessing'}: input_size is {given}, the model takes {wanted}; set it so")
    return steps


def float_model(out: Path, weights: str | None, repeated: dict[str, Any], terminal: Terminal) -> nn.Module | None:
    """The float model; None, with a note, if it is not available and no weights were given."""
    from vitquant import loading

    try:
        return loading.float_model(out, weights, **repeated)
    except VitquantError as error:
        if weights is not None:
            raise
        where = "; --weights PATH says where they are" if isinstance(error, ModelError) else ""
        terminal.note(f"not compared with the float model: {error}{where}")
        return None


def labelled_images(data: Path, quantized: QuantizedModel, reference: nn.Module | None, file: Path | None) -> Listing:
    """The images of a directory, each with its class.

    Arguments:
        data: the directory.
        quantized: the model whose classes are used.
        reference: its float model, if available.
        file: a file that maps folders to classes, if given.

    Raises:
        ModelError: the model has no logits among its outputs.
        DataError: the directory has no labelled images, or they have other classes.
    """
    from vitquant.tasks.classification import logits_among
    from vitquant.tasks.images import check_labels, load_listing

    logits = logits_among(quantized.outputs)
    if logits is None or len(logits) != 2:
        given = ", ".join(f"{name} {list(shape[1:])}" for name, shape in quantized.outputs.items())
        raise ModelError(f"the model gives no logits, one number for each class: its outputs are {given} for an image")
    items = load_listing(data, _classes_of(quantized, reference, logits[1], file))
    check_labels(items, logits[1])
    return items


def _classes_of(quantized: QuantizedModel, reference: nn.Module | None, count: int, file: Path | None) -> ClassNames:
    """The names of the model's classes, from a file if one is given, else from its library.

    Raises:
        ModelError: the model has no classification head.
    """
    from vitquant.tasks.classes import ClassNames, refuse_features
    from vitquant.tasks.classes_file import read_classes
    from vitquant.zoo import ModelSource, architecture, class_names

    source = quantized.provenance.get("source")
    if source is None:
        return ClassNames(count) if file is None else read_classes(file, count)
    known = ModelSource.from_dict(source)
    model = architecture(known) if reference is None else reference
    refuse_features(model)
    return class_names(model, known, count) if file is None else read_classes(file, count)

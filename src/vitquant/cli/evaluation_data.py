"""The preprocessing and the float model that a saved model is evaluated with."""

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
    """The preprocessing that was saved with the model, with the keys of a file laid over it."""
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
    """The float model; None, with a note, when its weights are not where they were and no others were given."""
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
        quantized: whose classes they are.
        reference: its float model, if it is there.
        file: that says which class a folder is, if one was given.

    Raises:
        ModelError: the model gives no logits.
        DataError: the directory is none of labelled images, or of other classes.
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
    """The model's classes: those of a file where one is given, else as its library names them.

    Raises:
        ModelError: it has no head, and its outputs are no classes.
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

"""Saved models and the float models that they were made from, made again of what their files say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from vitquant.autocast import in_own_precision
from vitquant.errors import CheckpointError, ModelError, VitquantError
from vitquant.files import recover
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.model import QuantizedModel
from vitquant.model.checkpoint import read_config, read_shapes
from vitquant.model.config import check_config
from vitquant.model.saved import restore
from vitquant.plain_forward import plain_forward
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.unwrapping import unwrapped
from vitquant.zoo import ModelSource, architecture, create
from vitquant.zoo.budget import Budget, ForwardBudget
from vitquant.zoo.trust import as_repeated

_LIFTED = "; where that is meant, repeat its source: --model NAME"

T = TypeVar("T")


@in_own_precision
def load(
    directory: str | Path,
    model: nn.Module | None = None,
    source: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> QuantizedModel:
    """Load a saved model; its outputs are bit for bit those of the model that was saved.

    What a file names is not trusted: of the model's source it may say by itself only names that its library lists, and
    arguments that are numbers and words of an architecture (`zoo.trust`).

    Arguments:
        directory: what `QuantizedModel.save` wrote.
        model: the float model, or one of the same architecture; needed when it was saved without a source.
        source: the name of the model, repeated: a `python:` factory, a hub's name or a directory that a file names
            alone is never imported, asked for or read.
        arguments: arguments of the model, repeated, that may load code or files, or be of any size.

    Raises:
        CheckpointError: the files are damaged, of another model or of a newer format; or say what has to be repeated.
        ModelError: the source cannot be made again.
    """
    directory = Path(directory)
    recover(directory)
    config = check_config(read_config(directory), directory)
    if config.get("preprocessing") is not None:
        _named(directory, lambda: Preprocessing.from_dict(config["preprocessing"]))
    if model is None:
        found = _source(directory, config, source, arguments)
        shapes = _shapes(directory, config)
        with Budget(shapes):
            model = architecture(found)
        _refuse_other_tensors(directory, model, shapes)
        if source is None:
            _named(directory, partial(_refuse_large_passes, model, config["input_shape"], shapes))
    model = unwrapped(model)
    channels, height, width = config["input_shape"]
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, channels, height, width, generator=generator).to(parameter)
    return restore(directory, CapturedModel(capture(model, example), (channels, height, width)))


def float_model(
    directory: str | Path,
    weights: str | None = None,
    source: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The float model that a saved model was made from, to compare with.

    Arguments:
        directory: what `QuantizedModel.save` wrote.
        weights: where the weights file is now, when it is not where it was; its content must be the same.
        source, arguments: see `load`.

    Raises:
        CheckpointError: it was saved without a source, or with one that has to be repeated, or with weights that would
            be fetched.
        ModelError: the weights are gone, or are others.
    """
    directory = Path(directory)
    config = check_config(read_config(directory), directory)
    found = _source(directory, config, source, arguments)
    if weights is None and found.weights == "pretrained" and found.library != "python":
        raise CheckpointError(
            f"{directory}: the weights of its float model are those that {found.library} publishes, which are fetched "
            "only where that is repeated: --weights pretrained"
        )
    if weights is None and found.weights not in ("pretrained", "random") and found.weights_sha256 is None:
        raise CheckpointError(f"{directory} names a file of float weights, and not what is in it; repeat it: --weights")
    if weights is not None:
        found = ModelSource.from_dict({**found.to_dict(), "weights": weights})
    with Budget(_shapes(directory, config)):
        return create(found)


def _source(
    directory: Path, config: Mapping[str, Any], repeated: str | None, arguments: Mapping[str, Any] | None
) -> ModelSource:
    if not config.get("source"):
        raise CheckpointError(f"{directory} was saved without the model's source: load({str(directory)!r}, model=...)")
    return _named(directory, lambda: as_repeated(ModelSource.from_dict(config["source"]), repeated, arguments or {}))


def _named(directory: Path, read: Callable[[], T]) -> T:
    """What is read of a config; an error names the directory."""
    try:
        return read()
    except VitquantError as error:
        raise CheckpointError(f"{directory}: {error}") from error


def _shapes(directory: Path, config: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """The shapes of a saved model's tensors, those of packed ones as they are in the model."""
    stored = read_shapes(directory, config)
    packed = config["quantization_config"]["packed"]
    fits = {
        key: entry["shape"]
        for key, entry in packed.items()
        if math.prod(entry["shape"]) <= 4 * math.prod(stored.get(key, [0]))
    }
    return {**stored, **fits}


def _refuse_other_tensors(directory: Path, model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse a source that builds another model before that model runs, which could take any time."""
    for key, tensor in model.state_dict().items():
        if list(tensor.shape) != list(shapes.get(key, [-1])):
            raise CheckpointError(f"{directory}: its source builds another model: {key} is not the one that was saved")


def _refuse_large_passes(model: nn.Module, shape: Sequence[int], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse a model, and an image size, that take far more memory than models of its size do.

    Raises:
        ModelError: an operator of one forward pass would make a tensor that is too large.
    """
    budget = ForwardBudget(shapes)
    if 2 * math.prod(shape) > budget.largest:
        raise ModelError(f"an image of {list(shape)} is far too large for a model of its size{_LIFTED}")
    try:
        with plain_forward(model), budget:
            model(torch.zeros(2, *shape))
    except ModelError as error:
        raise ModelError(f"{error}{_LIFTED}") from None
    except Exception:
        pass

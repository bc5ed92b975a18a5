"""Loading saved models, and the float models that they were made from."""

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
from vitquant.tasks.task import task_named
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

    The files are not trusted: by themselves they may name only a model that its library lists, and only arguments that
    are numbers and words of an architecture (`zoo.trust`). Everything else the caller must repeat.

    Arguments:
        directory: of a model that `QuantizedModel.save` wrote.
        model: the float model, or one of the same architecture; needed if the model was saved without a source.
        source: the name of the model, repeated: a `python:` factory is not imported, and a hub name or a directory not
            read, unless it is repeated here.
        arguments: those arguments of the model, repeated, that may load code or files, or be of any size.

    Raises:
        CheckpointError: the files are damaged, of another model or of another format; or the source must be repeated.
        ModelError: the model cannot be built from its source.
    """
    directory = Path(directory)
    recover(directory)
    config = check_config(read_config(directory), directory)
    if config.get("preprocessing") is not None:
        _named(directory, lambda: Preprocessing.from_dict(config["preprocessing"]))
    if config.get("task") is not None:
        _named(directory, lambda: task_named(config["task"]))
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
        directory: of a model that `QuantizedModel.save` wrote.
        weights: the new path of the weights file if it was moved; its content must be the same.
        source, arguments: see `load`.

    Raises:
        CheckpointError: the model was saved without a source, with one that must be repeated, or with weights that
            would be downloaded.
        ModelError: the weights are missing, or their content has changed.
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
    """The result of `read`; its errors become CheckpointErrors that name the directory."""
    try:
        return read()
    except VitquantError as error:
        raise CheckpointError(f"{directory}: {error}") from error


def _shapes(directory: Path, config: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """The shapes of a saved model's tensors; for packed tensors those of the unpacked weights."""
    stored = read_shapes(directory, config)
    packed = config["quantization_config"]["packed"]
    fits = {
        key: entry["shape"]
        for key, entry in packed.items()
        if math.prod(entry["shape"]) <= 4 * math.prod(stored.get(key, [0]))
    }
    return {**stored, **fits}


def _refuse_other_tensors(directory: Path, model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse a source that builds another model, before that model is run, which could take any time."""
    for key, tensor in model.state_dict().items():
        if list(tensor.shape) != list(shapes.get(key, [-1])):
            raise CheckpointError(f"{directory}: its source builds another model: {key} is not the one that was saved")


def _refuse_large_passes(model: nn.Module, shape: Sequence[int], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse a model and image size that take far more memory than is usual for models of its size.

    Raises:
        ModelError: an operator of a forward pass would create a tensor that is too large.
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

"""The three verbs: quantize a model by a recipe, load what was saved, and find its float model again."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from vitquant.autocast import in_own_precision
from vitquant.calibration_data import Batch, CalibrationData
from vitquant.errors import CheckpointError, ModelError, RecipeError, VitquantError
from vitquant.files import recover
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.lowering import check_possible, check_promise
from vitquant.methods.context import Context
from vitquant.methods.running import check_gradients, run_steps
from vitquant.methods.table import passes, planned
from vitquant.model import QuantizedModel
from vitquant.model.checkpoint import digest_of, read_config, read_shapes
from vitquant.model.config import check_config
from vitquant.model.saved import restore
from vitquant.plain_forward import plain_forward
from vitquant.progress import Progress, silent
from vitquant.recipe import Recipe, requested
from vitquant.recipe.override import Settings
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.unwrapping import unwrapped
from vitquant.work import WorkDirectory
from vitquant.zoo import ModelSource, architecture, create
from vitquant.zoo.budget import Budget, ForwardBudget
from vitquant.zoo.trust import as_repeated

_LIFTED = "; where that is meant, repeat its source: --model NAME"

T = TypeVar("T")


@in_own_precision
def quantize(
    model: nn.Module,
    recipe: str | Recipe,
    data: Iterable[Batch],
    *,
    bits: str | None = None,
    settings: Settings = (),
    simulated: bool = False,
    source: ModelSource | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress = silent,
    memory: float = 4.0,
    time_limit: float = math.inf,
    work: str | Path | None = None,
) -> QuantizedModel:
    """Quantize a model by a recipe; the model itself is left as it is.

    Arguments:
        model: any classifier that takes one batch of images; it is captured in evaluation mode, see `capture`.
        recipe: a recipe's name, the path of a TOML file, names joined by `+` to lay overlays over a
            recipe, or a `Recipe`; `default` is the best that lowers to integers at these bits.
        data: calibration batches: float tensors (batch, channels, height, width), or tuples that begin
            with one, or mappings with `pixel_values`. A recipe of several methods reads them several times, which
            a list or a DataLoader allows and a generator does not; image size is that of the first.
        bits: replaces the recipe's, such as "w8a8s4".
        settings: replaces single keys of the recipe: {"weights.observer": "omse"}, or ["weights.observer=omse"].
        simulated: take the model also where its recipe promises integers and some of it cannot be computed so.
        source: where the model came from; with it `load(directory)` needs nothing else.
        preprocessing: the model's, timm's data-configuration keys; saved with the model.
        seed: of what methods draw.
        progress: told what a method is doing, how much of it is done and how much there is.
        memory: gigabytes that a method may hold beside the models; the result does not depend on it.
        time_limit: seconds after which methods that choose or learn for long stop with what they have; their records
            say how far they came.
        work: a directory in which long work keeps its state: after an interruption the same call goes on there. It
            can be removed afterwards.

    Raises:
        LoweringError: the recipe promises integers (its method `integer-operations` computes every kind so), the
            bits, the model or its calibration do not allow it, and not `simulated`; it names the site and what to do.
            Said before calibration wherever that does not depend on the images.
        CheckpointError: the work directory is another run's.
        VitquantError: see `capture`, `requested` and the recipe's methods.
    """
    deadline = time.monotonic() + time_limit
    if not 0 < memory < math.inf:
        raise RecipeError(f"memory = {memory}: it is positive, in gigabytes")
    if not time_limit >= 0:
        raise RecipeError(f"time_limit = {time_limit}: it is seconds, 0 or more")
    said = None if preprocessing is None else Preprocessing.from_dict(preprocessing).to_dict()
    recipe, widths = requested(recipe, bits, settings)
    steps = planned(recipe)
    model = unwrapped(model)
    stream = CalibrationData(data, next((parameter.device for parameter in model.parameters()), None))
    example = stream.example
    shape = (int(example.shape[1]), int(example.shape[2]), int(example.shape[3]))
    captured = CapturedModel(capture(model, example), shape)
    check_gradients(captured, example, steps)
    teacher = copy.deepcopy(captured) if any(step.definition.needs.teacher for step in steps) else None
    quantized = QuantizedModel(captured, recipe, widths)
    for step in steps:
        step.check(quantized)
    stream.check(passes(steps, quantized), any(step.definition.needs.labels for step in steps))
    if not simulated:
        check_possible(captured, recipe, widths)
    with ExitStack() as held:
        kept = None
        if work is not None:
            asked = {"recipe": recipe.to_dict(), "bits": str(widths), "seed": seed, "images": stream.first}
            kept = held.enter_context(WorkDirectory.opened(work, {"model": _digest(captured), **asked}))
        context = Context(stream, stream.labelled(), teacher, seed, progress, memory, deadline)
        run_steps(quantized, steps, context, kept)
    if not simulated:
        check_promise(quantized)
    quantized.provenance = {
        "source": None if source is None else source.to_dict(),
        "preprocessing": said,
        "calibration": {"images": stream.images, "sha256": stream.digest},
    }
    return quantized


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


def _digest(captured: CapturedModel) -> str:
    """Tells float models apart."""
    return digest_of(captured.graph_module.state_dict(), {"graph": captured.index.fingerprint})


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

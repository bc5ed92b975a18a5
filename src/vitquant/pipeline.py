"""The three verbs: quantize a model by a recipe, load what was saved, and find its float model again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from vitquant.capture import capture
from vitquant.checkpoint import read_config
from vitquant.errors import CalibrationError, CheckpointError, RecipeError, VitquantError
from vitquant.lowering import check_possible, check_promise
from vitquant.methods.calibrate import CalibrateSettings, calibrate
from vitquant.methods.integer_operations import integer_operations
from vitquant.methods.power_of_two_factor import ChooseFactorsSettings, choose_factors
from vitquant.methods.scale_reparameterization import ReparameterizeScalesSettings, reparameterize_scales
from vitquant.methods.scale_search import SearchScalesSettings, search_scales
from vitquant.model import QuantizedModel, Record
from vitquant.operations import Arithmetic
from vitquant.progress import Progress, silent
from vitquant.recipe import Method, Recipe, requested
from vitquant.zoo import ModelSource, architecture, create

# The order in which methods run, whatever order a recipe and its overlays name them in.
_ORDER = ("calibrate", "reparameterize-scales", "search-scales", "choose-factors", "integer-operations")

Settings = TypeVar("Settings")
Batch = torch.Tensor | Sequence[Any] | Mapping[str, torch.Tensor]


def quantize(
    model: nn.Module,
    recipe: str | Recipe,
    data: Iterable[Batch],
    *,
    bits: str | None = None,
    settings: Sequence[str] = (),
    simulated: bool = False,
    source: ModelSource | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> QuantizedModel:
    """Quantize a model by a recipe; the model itself is left as it is.

    Arguments:
        model: any classifier that takes one batch of images; it is captured in evaluation mode.
        recipe: a recipe's name, the path of a TOML file, names joined by `+` to lay overlays over a
            recipe, or a `Recipe`; `default` is the best that lowers to integers at these bits.
        data: calibration batches: float tensors (batch, channels, height, width), or tuples that begin
            with one, or mappings with `pixel_values`. A recipe of several methods reads them several times, which
            a list or a DataLoader allows and a generator does not; image size is that of the first.
        bits: replaces the recipe's, such as "w8a8s4".
        settings: replaces single keys of the recipe, such as "weights.observer=omse".
        simulated: take the model also where its recipe promises integers and some of it cannot be computed so.
        source: where the model came from; with it `load(directory)` needs nothing else.
        preprocessing: the model's, timm's data-configuration keys; saved with the model.
        progress: told what a search is doing, how much of it is done and how much there is.

    Raises:
        LoweringError: the recipe promises integers (its method `integer-operations` computes every kind so), the
            bits, the model or its calibration do not allow it, and not `simulated`; it names the site and what to do.
            Said before calibration wherever that does not depend on the images.
        VitquantError: see `capture`, `requested` and the recipe's methods.
    """
    recipe, widths = requested(recipe, bits, settings)
    steps = [_step(method, progress) for method in sorted(recipe.methods, key=_place)]
    batches = iter(data)
    first = next(batches, None)
    if first is None:
        raise CalibrationError("no calibration images: give at least one batch")
    example = images_of(first)
    device = next((parameter.device for parameter in model.parameters()), example.device)
    stream = _Stream(data, first, batches, device)
    captured = capture(model, example[:2].to(device))
    shape = (int(example.shape[1]), int(example.shape[2]), int(example.shape[3]))
    quantized = QuantizedModel(captured, recipe, widths, shape)
    if not simulated:
        check_possible(captured, recipe, widths, shape)
    for step in steps:
        quantized.records.append(step(quantized, stream))
    if not simulated:
        check_promise(quantized)
    quantized.provenance = {
        "source": None if source is None else source.to_dict(),
        "preprocessing": None if preprocessing is None else dict(preprocessing),
        "calibration": {"images": stream.images, "sha256": stream.digest.hexdigest()},
    }
    return quantized


def load(directory: str | Path, model: nn.Module | None = None, source: str | None = None) -> QuantizedModel:
    """Load a saved model; its outputs are bit for bit those of the model that was saved.

    Arguments:
        directory: what `QuantizedModel.save` wrote.
        model: the float model, or one of the same architecture; needed when it was saved without a source.
        source: the name of a `python:` factory, repeated; a factory named in a file alone is never imported.

    Raises:
        CheckpointError: the files are damaged, of another model or of a newer format.
        ModelError: the source cannot be made again.
    """
    config = read_config(Path(directory))
    if model is None:
        model = architecture(_source(Path(directory), config, source))
    channels, height, width = config["input_shape"]
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, channels, height, width, generator=generator).to(parameter)
    return QuantizedModel.restore(directory, capture(model, example))


def float_model(directory: str | Path, weights: str | None = None, source: str | None = None) -> nn.Module:
    """The float model that a saved model was made from, to compare with.

    Arguments:
        directory: what `QuantizedModel.save` wrote.
        weights: where the weights file is now, when it is not where it was; its content must be the same.
        source: see `load`.

    Raises:
        CheckpointError: it was saved without a source.
        ModelError: the weights are gone, or are others.
    """
    config = read_config(Path(directory))
    found = _source(Path(directory), config, source)
    if weights is not None:
        found = ModelSource.from_dict({**found.to_dict(), "weights": weights})
    return create(found)


def _source(directory: Path, config: Mapping[str, Any], repeated: str | None) -> ModelSource:
    if not config.get("source"):
        raise CheckpointError(f"{directory} was saved without the model's source: load({str(directory)!r}, model=...)")
    source = ModelSource.from_dict(config["source"])
    if source.library == "python" and repeated != source.name:
        raise CheckpointError(f"{directory} was made by {source.name}; to import and run it, repeat it: --model NAME")
    if repeated is not None and repeated != source.name:
        raise CheckpointError(f"{directory} was made from {source.name}, not from {repeated}")
    return source


def _place(method: Method) -> int:
    """Where a method runs: an overlay cannot know what its recipe and other overlays bring."""
    return _ORDER.index(method.name) if method.name in _ORDER else len(_ORDER)


def _step(method: Method, progress: Progress) -> Callable[[QuantizedModel, Iterable[torch.Tensor]], Record]:
    """One method of a recipe, ready to run; its settings are checked before any work is done."""
    match method.name:
        case "calibrate":
            return _with_settings(calibrate, CalibrateSettings, method)
        case "choose-factors":
            return _with_settings(choose_factors, ChooseFactorsSettings, method)
        case "reparameterize-scales":
            return _with_settings(reparameterize_scales, ReparameterizeScalesSettings, method)
        case "search-scales":
            return _with_settings(partial(search_scales, progress=progress), SearchScalesSettings, method)
        case "integer-operations":
            return _with_settings(integer_operations, Arithmetic, method)
        case _:
            raise RecipeError(f"method {method.name!r} is unknown; the methods are: {', '.join(_ORDER)}")


def _with_settings(
    run: Callable[[QuantizedModel, Iterable[torch.Tensor], Settings], Record], kind: type[Settings], method: Method
) -> Callable[[QuantizedModel, Iterable[torch.Tensor]], Record]:
    try:
        settings = kind(**method.settings)
    except TypeError:
        known = ", ".join(field.name for field in fields(kind)) or "none"  # type: ignore[arg-type]
        given = sorted(method.settings)
        raise RecipeError(f"method {method.name!r}: settings {given} do not fit; it has: {known}") from None

    def step(model: QuantizedModel, data: Iterable[torch.Tensor]) -> Record:
        try:
            return run(model, data, settings)
        except CalibrationError as error:
            where = f"{method.name} at {error.site}" if error.site else method.name
            raise CalibrationError(f"{where}: {error.problem}") from error
        except VitquantError as error:
            raise type(error)(f"{method.name}: {error}") from error

    return step


class _Stream:
    """Calibration batches on their way: to the model's device, and the first time counted and hashed for the record."""

    def __init__(self, data: Iterable[Batch], first: Batch, rest: Iterator[Batch], device: torch.device) -> None:
        self._data, self._begun, self._device = data, chain([first], rest), device
        self.images = 0
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self._begun is None:
            for batch in self._again():
                yield images_of(batch).to(self._device)
            return
        batches, self._begun = self._begun, None
        for batch in batches:
            images = images_of(batch)
            self.images += len(images)
            self.digest.update(images.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            yield images.to(self._device)

    def _again(self) -> Iterator[Batch]:
        again = iter(self._data)
        if again is self._data:
            raise CalibrationError(
                "the recipe reads the calibration images more than once, and these can be read once only; "
                "give a list of batches or a DataLoader"
            )
        return again


def images_of(batch: Batch) -> torch.Tensor:
    """The images of a batch, as `quantize` takes it.

    Raises:
        CalibrationError: it is none.
    """
    if isinstance(batch, Mapping):
        batch = batch.get("pixel_values", next(iter(batch.values()), ()))
    elif isinstance(batch, Sequence) and batch:
        batch = batch[0]
    if not isinstance(batch, torch.Tensor) or batch.ndim != 4 or not batch.is_floating_point() or not len(batch):
        raise CalibrationError(
            "a calibration batch is a float tensor (batch, channels, height, width), a tuple that begins with one, "
            f"or a mapping with pixel_values; got {type(batch).__name__}"
        )
    return batch

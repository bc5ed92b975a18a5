"""The three verbs: quantize a model by a recipe, load what was saved, and find its float model again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from torch import nn

from vitquant.autocast import in_own_precision
from vitquant.errors import CalibrationError, CheckpointError, ModelError, RecipeError, VitquantError
from vitquant.files import recover
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.integer_modules import Arithmetic
from vitquant.lowering import check_possible, check_promise
from vitquant.methods.calibrate import CalibrateSettings, calibrate
from vitquant.methods.integer_operations import integer_operations
from vitquant.methods.output_reconstruction import ReconstructOutputSettings, reconstruct_output
from vitquant.methods.power_of_two_factor import ChooseFactorsSettings, choose_factors
from vitquant.methods.scale_reparameterization import ReparameterizeScalesSettings, reparameterize_scales
from vitquant.methods.scale_search import SearchScalesSettings, search_scales
from vitquant.model import QuantizedModel, Record
from vitquant.model.checkpoint import read_config, read_shapes
from vitquant.model.config import check_config
from vitquant.model.saved import restore
from vitquant.plain_forward import plain_forward
from vitquant.progress import Progress, silent
from vitquant.recipe import Method, Recipe, requested
from vitquant.schema import Table, check, of_type
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.unwrapping import unwrapped
from vitquant.zoo import ModelSource, architecture, create
from vitquant.zoo.budget import Budget, ForwardBudget
from vitquant.zoo.trust import as_repeated

# The order in which methods run, whatever order a recipe and its overlays name them in.
_ORDER = (
    "calibrate",
    "reparameterize-scales",
    "search-scales",
    "choose-factors",
    "reconstruct-output",
    "integer-operations",
)

_LIFTED = "; where that is meant, repeat its source: --model NAME"

Settings = TypeVar("Settings")
T = TypeVar("T")
Batch = torch.Tensor | Sequence[Any] | Mapping[str, torch.Tensor]


@in_own_precision
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
        model: any classifier that takes one batch of images; it is captured in evaluation mode, see `capture`.
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
    said = None if preprocessing is None else Preprocessing.from_dict(preprocessing).to_dict()
    recipe, widths = requested(recipe, bits, settings)
    steps = [_step(method, progress) for method in sorted(recipe.methods, key=_place)]
    model = unwrapped(model)
    batches = iter(batches_of(data))
    first = next(batches, None)
    if first is None:
        raise CalibrationError("no calibration images: give at least one batch")
    example = images_of(first)
    device = next((parameter.device for parameter in model.parameters()), example.device)
    stream = _Stream(data, first, batches, device, example.dtype)
    shape = (int(example.shape[1]), int(example.shape[2]), int(example.shape[3]))
    captured = CapturedModel(capture(model, example[:2].to(device)), shape)
    quantized = QuantizedModel(captured, recipe, widths)
    if not simulated:
        check_possible(captured, recipe, widths)
    for step in steps:
        quantized.records.append(step(quantized, stream))
    if not simulated:
        check_promise(quantized)
    quantized.provenance = {
        "source": None if source is None else source.to_dict(),
        "preprocessing": said,
        "calibration": {"images": stream.images, "sha256": stream.digest.hexdigest()},
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
        case "reconstruct-output":
            return _with_settings(partial(reconstruct_output, progress=progress), ReconstructOutputSettings, method)
        case "integer-operations":
            return _with_settings(integer_operations, Arithmetic, method)
        case _:
            raise RecipeError(f"method {method.name!r} is unknown; the methods are: {', '.join(_ORDER)}")


def _with_settings(
    run: Callable[[QuantizedModel, Iterable[torch.Tensor], Settings], Record], kind: type[Settings], method: Method
) -> Callable[[QuantizedModel, Iterable[torch.Tensor]], Record]:
    hints = {name: of_type(hint) for name, hint in get_type_hints(kind).items()}
    check(method.settings, Table({}, hints), RecipeError, method.name)
    settings = kind(**method.settings)

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

    def __init__(
        self, data: Iterable[Batch], first: Batch, rest: Iterator[Batch], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._data, self._begun, self._device, self._dtype = data, chain([first], rest), device, dtype
        self.images = 0
        self.digest = hashlib.sha256()

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self._begun is None:
            for batch in self._again():
                yield self._images(batch).to(self._device)
            return
        batches, self._begun = self._begun, None
        for batch in batches:
            images = self._images(batch)
            self.images += len(images)
            self.digest.update(images.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            yield images.to(self._device)

    def _images(self, batch: Batch) -> torch.Tensor:
        images = images_of(batch)
        if images.dtype != self._dtype:
            raise CalibrationError(
                f"a calibration batch is of {images.dtype} and the first of {self._dtype}: give all of one precision"
            )
        return images

    def _again(self) -> Iterator[Batch]:
        again = iter(self._data)
        if again is self._data:
            raise CalibrationError(
                "the recipe reads the calibration images more than once, and these can be read once only; "
                "give a list of batches or a DataLoader"
            )
        return again


def batches_of(data: Iterable[Batch]) -> Iterable[Batch]:
    """The data, where it is many batches.

    Raises:
        CalibrationError: it is one tensor, or one mapping, or nothing that holds batches.
    """
    if isinstance(data, torch.Tensor | Mapping):
        raise CalibrationError(f"the calibration data is one {type(data).__name__}: give a list of batches, [data]")
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise CalibrationError(
            f"the calibration data is of type {type(data).__name__}: give a list of batches or a DataLoader"
        )
    return data


def images_of(batch: Batch) -> torch.Tensor:
    """The images of a batch, as `quantize` takes it.

    Raises:
        CalibrationError: it is none.
    """
    images: Any = batch
    if isinstance(batch, Mapping):
        images = batch.get("pixel_values", next(iter(batch.values()), ()))
    elif isinstance(batch, Sequence) and batch:
        images = batch[0]
    if not isinstance(images, torch.Tensor):
        got = type(batch).__name__ if images is batch else f"{type(batch).__name__} of {type(images).__name__}"
    elif images.ndim != 4:
        got = f"a tensor of {images.ndim} dimensions, {list(images.shape)}"
    elif not images.is_floating_point():
        got = f"a tensor of {images.dtype}"
    elif not images.numel():
        got = f"an empty one, {list(images.shape)}"
    else:
        return images
    raise CalibrationError(
        "a calibration batch is a float tensor (batch, channels, height, width), a tuple that begins with one, "
        f"or a mapping with pixel_values; got {got}"
    )

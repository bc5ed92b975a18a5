"""A model's preprocessing from its library, as a `Preprocessing`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vitquant.errors import ModelError
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.zoo.failures import import_library
from vitquant.zoo.source import ModelSource


def preprocessing_of(model: nn.Module, source: ModelSource, file: str | Path | None = None) -> Preprocessing:
    """The preprocessing with which the model was trained, according to its library, overridden by the keys of a file.

    timm: the model's data configuration. torchvision: the transforms of the default weights. transformers:
    the checkpoint's image processor, or if there is none the default one of the model type, with the size
    from the config. A user's factory: the common one for ImageNet.

    Raises:
        ModelError: `Preprocessing` cannot express a step (another rescaling than 1/255, flipped channels), and no file
            is given.
        DataError: the file cannot be read, or has an unknown key or a bad value.

    Pitfall: weights may have been trained with another preprocessing than the default; a `--preprocessing` file
        overrides it.
    """
    if file is None:
        return _said_by_library(model, source)
    try:
        own = _said_by_library(model, source)
    except ModelError:  # it says to give a file, and here is one
        own = None
    return Preprocessing.from_toml(file, own)


def _said_by_library(model: nn.Module, source: ModelSource) -> Preprocessing:
    if source.library == "timm":
        return _timm_preprocessing(model, source)
    if source.library == "torchvision":
        return _torchvision_preprocessing(source)
    if source.library == "transformers":
        return _transformers_preprocessing(model, source)
    return Preprocessing()


def _timm_preprocessing(model: nn.Module, source: ModelSource) -> Preprocessing:
    values = dict(import_library("timm.data").resolve_model_data_config(model))
    if size := source.arguments.get("img_size"):  # which the configuration ignores
        values["input_size"] = (3, *_pair(size))
    return Preprocessing.from_dict(values)


def _torchvision_preprocessing(source: ModelSource) -> Preprocessing:
    preset: Any = import_library("torchvision").models.get_model_weights(source.model).DEFAULT.transforms()
    if not hasattr(preset, "crop_size"):
        return Preprocessing()
    size = _pair(source.arguments.get("image_size", preset.crop_size[0]))
    return Preprocessing(
        input_size=(3, *size),
        interpolation=preset.interpolation.value,
        crop_pct=_crop_pct(preset.crop_size[0], preset.resize_size[0]),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _transformers_preprocessing(model: nn.Module, source: ModelSource) -> Preprocessing:
    processor, own = _image_processor(model, source)
    if not processor.do_rescale or abs(processor.rescale_factor * 255 - 1) > 1e-6:
        raise ModelError(
            f"{source.name}: its image processor does not scale pixels by 1/255; give --preprocessing FILE"
        )
    if getattr(processor, "do_flip_channel_order", False):
        raise ModelError(f"{source.name}: its image processor flips the channels; give --preprocessing FILE")
    shortest = processor.size.get("shortest_edge")
    resized = shortest or processor.size.get("height") or 224
    if type(processor).__name__.startswith("Levit"):
        resized = int(resized * 256 / 224)  # as its processor does
    crop = (processor.crop_size["height"], processor.crop_size["width"]) if processor.do_center_crop else None
    size = crop or (resized, resized if shortest else processor.size.get("width") or resized)
    crop_pct = _crop_pct(size[0], resized)
    config: Any = model.config
    if not own and getattr(config, "image_size", None):
        size = _pair(config.image_size)
    resample = processor.resample  # a torchvision or a PIL enumeration, or PIL's number
    names = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
    return Preprocessing(
        input_size=(3, size[0], size[1]),
        interpolation=resample.value if isinstance(getattr(resample, "value", 0), str) else names[int(resample)],
        crop_pct=crop_pct,
        mean=tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
        std=tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
        crop_mode="center" if shortest else "squash",
    )


def _image_processor(model: nn.Module, source: ModelSource) -> tuple[Any, bool]:
    """The checkpoint's own image processor and True, or the model type's default and False."""
    transformers, path = import_library("transformers"), Path(source.model)
    folder = path.parent if os.path.isfile(path) else path
    if os.path.isfile(folder / "preprocessor_config.json") or (
        source.weights == "pretrained" and not os.path.exists(path)
    ):
        try:
            return transformers.AutoImageProcessor.from_pretrained(folder.as_posix(), trust_remote_code=False), True
        except (OSError, ValueError):
            pass  # the checkpoint came without one
    try:
        classes = transformers.IMAGE_PROCESSOR_MAPPING[type(model.config)]
    except KeyError as error:
        raise ModelError(
            f"{source.name}: transformers has no image processor for it; give --preprocessing FILE"
        ) from error
    choices = classes.values() if isinstance(classes, Mapping) else classes  # version 5 | version 4
    return next(choice for choice in choices if choice is not None)(), False


def _crop_pct(crop: int, resized: int) -> float:
    """The share crop / resized, rounded so that `floor(crop / share)` is exactly `resized`."""
    share = min(crop / resized, 1.0)
    return share if math.floor(crop / share) == resized else math.nextafter(share, 0)


def _pair(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, list | tuple) else (size, size)

"""The names of a model's classes, from its library."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from vitquant.tasks.classes import ClassNames
from vitquant.zoo.failures import import_library
from vitquant.zoo.source import ModelSource

_PLACEHOLDER = re.compile(r"LABEL_\d+")  # transformers' names for classes without names


def class_names(model: nn.Module, source: ModelSource, count: int) -> ClassNames:
    """The names of a model's classes, as far as its library knows them.

    timm: the names that come with the weights, or those of the ImageNet set with the model's number of classes.
    torchvision: the categories of the default weights. transformers: the config's `id2label`. For all libraries
    ImageNet's synsets are added, which cannot be confused with other names.

    Arguments:
        count: the number of classes of the model.

    Pitfall: for a model whose weights were trained on the same number of other classes, the names are wrong;
    `read_classes` reads a file with the right ones.
    """
    names, origin = {}, ""
    if source.library == "timm":
        names, origin = _timm_names(model, count)
    elif source.library == "torchvision":
        weights: Any = import_library("torchvision").models.get_model_weights(source.model).DEFAULT
        names, origin = _numbered(weights.meta.get("categories", ())), f"torchvision's {source.model}"
    elif source.library == "transformers":
        config: Any = model.config
        names = {int(index): (str(name),) for index, name in (config.id2label or {}).items()}
        origin = f"the config of {source.model}"
        if all(_PLACEHOLDER.fullmatch(name) for (name,) in names.values()):
            names = {}
    synsets, imagenet = _synsets(count)
    if set(names) != set(range(count)):
        return ClassNames(count, synsets, imagenet)
    both = {index: (*synsets.get(index, ()), *names[index]) for index in names}
    return ClassNames(count, both, origin)


def _timm_names(model: nn.Module, count: int) -> tuple[dict[int, tuple[str, ...]], str]:
    config = getattr(model, "pretrained_cfg", None) or {}
    labels, described = config.get("label_names"), config.get("label_descriptions") or {}
    if labels and len(labels) == count:
        names = {index: (name, described[name]) if name in described else (name,) for index, name in enumerate(labels)}
        return names, "the classes that came with its weights"
    return _imagenet(count, described=True)


def _synsets(count: int) -> tuple[dict[int, tuple[str, ...]], str]:
    try:
        return _imagenet(count, described=False)
    except ImportError:
        return {}, ""


def _imagenet(count: int, described: bool) -> tuple[dict[int, tuple[str, ...]], str]:
    """The synsets, and names if `described`, of the ImageNet set with `count` classes, in timm's order; else empty."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return {}, ""
    info = ImageNetInfo(subset)
    names = info.label_names()
    if described:
        return {index: (name, info.label_name_to_description(name)) for index, name in enumerate(names)}, subset
    return _numbered(names), f"the synsets of {subset}"


def _numbered(names: Iterable[str]) -> dict[int, tuple[str, ...]]:
    return {index: (name,) for index, name in enumerate(names)}

"""Building a library's own, unmodified model from its source."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from vitquant.errors import ModelError
from vitquant.zoo.failures import first_five, import_library, one_line, shown, unknown
from vitquant.zoo.source import ModelSource
from vitquant.zoo.weights import Note, load_weights, warn


def create(source: ModelSource, note: Note = warn) -> nn.Module:
    """Build the library's own model, with its weights, in eval mode and float32 on the CPU.

    A `python:` factory with `pretrained` weights keeps the weights with which it returns the model.

    Arguments:
        note: called with notes for the user about a weights file: which weights were chosen among several, and what
            the library converted or resampled.

    Raises:
        ModelError: the library is not installed, the name or an argument is unknown, or the weights
            are not available or do not fit; the message names up to 5 keys that do not fit.

    Pitfall: without a network, the hub's client tries for about a minute before it fails.
    """
    if source.weights_key is not None and source.weights in ("pretrained", "random"):
        raise ModelError(f"weights_key {source.weights_key!r} chooses within a file; {source.weights} weights are none")
    if source.weights == "pretrained" and source.library != "python":
        model = _pretrained(source)
    else:
        model = architecture(source)
        if source.weights not in ("pretrained", "random"):
            load_weights(model, source, note)
    return model.float().eval()


def architecture(source: ModelSource) -> nn.Module:
    """Build the model as `create` does, but with random weights, which are the same for the same seed.

    Raises:
        ModelError: as for `create`, except for weights.

    Pitfall: a transformers hub name still needs its config.json, from the hub or its cache.
    """
    try:
        # a seed for this model only: the global generators, including CUDA's, are not changed
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(source.seed)
            model = _BUILDERS[source.library](source)
    except ModelError:
        raise
    except Exception as error:  # libraries raise anything for invalid arguments
        raise ModelError(f"{source.name} cannot be built with {shown(source.arguments)}: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{source.name} gives {type(model).__name__}, not a torch.nn.Module")
    return model.float().eval()


def check_name(source: ModelSource) -> None:
    """Refuse a model that its library does not know, without building one; factories are not checked.

    Raises:
        ModelError: the library is not installed or does not know the name.
    """
    if source.library in _LIBRARIES:
        _LIBRARIES[source.library](source)


def _timm(source: ModelSource) -> ModuleType:
    """The library, after checking that it knows the model."""
    timm = import_library("timm")
    name = source.model.split(".")[0]  # the rest is the tag of pretrained weights
    if ":" not in name and not timm.is_model(name):
        raise unknown(source, name, timm.list_models())
    return timm


def _torchvision(source: ModelSource) -> ModuleType:
    models = import_library("torchvision").models
    if source.model not in models.list_models():
        raise unknown(source, source.model, models.list_models())
    return models


def _transformers(source: ModelSource) -> ModuleType:
    transformers = import_library("transformers")
    known = "/" in source.model or _is_local(source) or source.model in transformers.CONFIG_MAPPING
    if not known:
        raise unknown(source, source.model, transformers.CONFIG_MAPPING)
    return transformers


def _is_local(source: ModelSource) -> bool:
    return os.path.isfile(source.model) or os.path.isfile(Path(source.model) / "config.json")


_LIBRARIES = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}


def _build_timm(source: ModelSource, pretrained: bool = False) -> nn.Module:
    return _timm(source).create_model(source.model, pretrained=pretrained, **source.arguments)


def _build_torchvision(source: ModelSource, pretrained: bool = False) -> nn.Module:
    models = _torchvision(source)
    arguments: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(source.model)).parameters:
        arguments["weights_backbone"] = None  # else torchvision downloads a backbone
    return models.get_model(source.model, **{**arguments, **source.arguments})


def _build_transformers(source: ModelSource, pretrained: bool = False) -> nn.Module:
    auto = import_library("transformers").AutoModelForImageClassification
    config = _transformers_config(source)
    config.architectures = config.architectures or []  # None, its default, breaks types with two classes (deit)
    trusted = _trusted(source)
    if not pretrained:
        return auto.from_config(config, dtype=torch.float32, **trusted)
    folder = Path(source.model).parent if os.path.isfile(source.model) else source.model
    model, info = auto.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True, **trusted)
    # transformers initializes these randomly, with only a warning
    if absent := sorted(info["missing_keys"]) + [str(key[0]) for key in info["mismatched_keys"]]:
        raise ModelError(f"{source.name}: its checkpoint has no fitting {first_five(absent)}; give --weights FILE")
    return model


def _build_python(source: ModelSource) -> nn.Module:
    module_name, _, factory_name = source.model.partition(":")
    if not module_name or not factory_name:
        raise ModelError(f"{source.name}: write python:package.module:factory")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except Exception as error:  # the user's module may raise anything
        raise ModelError(f"{source.name} cannot be imported: {one_line(error)}; is it on PYTHONPATH?") from error
    return factory(**source.arguments)


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "timm": _build_timm,
    "transformers": _build_transformers,
    "torchvision": _build_torchvision,
    "python": _build_python,
}


def _pretrained(source: ModelSource) -> nn.Module:
    try:
        model = _BUILDERS[source.library](source, pretrained=True)
    except ModelError:
        raise
    except Exception as error:
        architecture(source)  # raises if the arguments and not the weights are wrong
        raise ModelError(
            f"{source.name}: no pretrained weights ({one_line(error)}); give --weights FILE or --weights random"
        ) from error
    trained_classes = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    if source.library == "timm" and source.arguments.get("num_classes", trained_classes) not in (trained_classes, 0):
        # timm drops the head and leaves a random one
        raise ModelError(f"{source.name}: pretrained for {trained_classes} classes; give --weights FILE for others")
    return model


def _transformers_config(source: ModelSource) -> Any:
    transformers = _transformers(source)
    if not _is_local(source) and source.model in transformers.CONFIG_MAPPING:
        if source.weights == "pretrained":
            raise ModelError(f"{source.name} is a model type without weights; give --weights FILE or --weights random")
        config = transformers.AutoConfig.for_model(source.model, **source.arguments)
        # transformers would store a misspelt argument as an attribute
        return _refuse_unused(source, [key for key in source.arguments if not hasattr(type(config)(), key)], config)
    try:
        config, unused = transformers.AutoConfig.from_pretrained(
            source.model, return_unused_kwargs=True, **{**source.arguments, **_trusted(source)}
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source.name}: no config ({one_line(error)}); give the path of its config.json, "
            "and --weights FILE or --weights random"
        ) from error
    kernel = str(getattr(config, "_attn_implementation", None))
    if "/" in kernel and "attn_implementation" not in source.arguments:  # code from the hub
        raise ModelError(
            f"{source.name}: its config asks for the code {kernel!r}; --model-arg attn_implementation=sdpa"
        )
    return _refuse_unused(source, [key for key in unused if key != "trust_remote_code"], config)


def _trusted(source: ModelSource) -> dict[str, bool]:
    """The argument that lets code from a checkpoint run: false, unless the user passes it as a model argument."""
    return {"trust_remote_code": source.arguments.get("trust_remote_code", False) is True}


def _refuse_unused(source: ModelSource, unused: list[str], config: Any) -> Any:
    if unused:
        raise unknown(source, unused[0], [key for key in config.to_dict() if key not in unused], "argument")
    return config

"""Conversion of checkpoints with other names or another image size, by the functions of the model's library."""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def converted_by_library(model: nn.Module, given: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]] | None:
    """Convert the names and the size of position embeddings of a checkpoint that does not fit, by the model's library.

    timm: `checkpoint_filter_fn` of the model's module. torchvision: `interpolate_embeddings`. transformers: the
    conversion of `from_pretrained`, and the `interpolate_pos_encoding` of the model's embeddings. Then, for any model,
    the conversion of names of earlier versions by its modules.

    Arguments:
        model: the model for the weights; it is not changed.
        given: tensors by the names of the checkpoint.

    Returns:
        The name of the library and the tensors, which may still not fit; None if no conversion succeeded.
    """
    library = type(model).__module__.partition(".")[0]
    library = library if library in _CONVERT else "the model's own load_state_dict"
    found: dict[str, Tensor] | None = None
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for convert in (_CONVERT.get(library, _as_it_is), _by_its_own_hooks):
            # A library may raise anything for a foreign checkpoint; the caller then reports what does not fit.
            with contextlib.suppress(Exception):
                converted = convert(model, dict(given if found is None else found))
                if all(isinstance(tensor, Tensor) for tensor in converted.values()):
                    found = converted
    return None if found is None else (library, found)


def _as_it_is(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return given


def _by_its_own_hooks(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors after the model's modules have converted names of earlier versions on loading (torchvision's MLP)."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(given)
    return {key: tensor for key, tensor in twin.state_dict().items() if isinstance(tensor, Tensor)}


def _by_timm(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(sys.modules[type(model).__module__].checkpoint_filter_fn(given, model))


def _by_torchvision(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    if not isinstance(model, VisionTransformer):
        return given
    return dict(interpolate_embeddings(model.image_size, model.patch_size, given))  # type: ignore[arg-type]


def _by_transformers(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    wanted, base = model.state_dict(), model.base_model_prefix
    if not any(key.startswith(f"{base}.") for key in given):  # saved without a head
        given = {key if key in wanted else f"{base}.{key}": tensor for key, tensor in given.items()}
    given = _resampled_positions(model, given)
    if given.keys() == wanted.keys():
        return given
    loaded, info = type(model).from_pretrained(
        None, config=model.config, state_dict=given, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        return given
    return loaded.state_dict()


def _resampled_positions(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Resample position embeddings to the model's image size, with the library's function for larger images."""
    size = getattr(model.config, "image_size", None)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    resampled = dict(given)
    for name, part in model.named_modules():
        own, key = getattr(part, "position_embeddings", None), f"{name}.position_embeddings"
        if not hasattr(part, "interpolate_pos_encoding") or not isinstance(own, nn.Parameter) or key not in given:
            continue
        if given[key].shape != own.shape:
            try:
                part.position_embeddings = nn.Parameter(given[key].float())
                resampled[key] = part.interpolate_pos_encoding(torch.empty_like(own), height, width)
            finally:
                part.position_embeddings = own
    return resampled


_CONVERT = {"timm": _by_timm, "torchvision": _by_torchvision, "transformers": _by_transformers}

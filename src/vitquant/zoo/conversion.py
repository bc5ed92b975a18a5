"""Checkpoints of another form or image size, brought to a model by its library's own functions."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def converted_by_library(model: nn.Module, given: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]] | None:
    """What the model's library makes of a checkpoint that does not fit: its names, and positions of another size.

    timm: `checkpoint_filter_fn` of the model's module. torchvision: `interpolate_embeddings`. transformers: the
    conversion of `from_pretrained`, and the `interpolate_pos_encoding` of the model's embeddings.

    Arguments:
        model: where the weights will be; it is left as it is.
        given: by the names of the checkpoint.

    Returns:
        The library's name and the tensors, which may not fit either; None where it has no such function, or refuses.
    """
    library = type(model).__module__.partition(".")[0]
    convert = {"timm": _by_timm, "torchvision": _by_torchvision, "transformers": _by_transformers}.get(library)
    if convert is None:
        return None
    try:
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            converted = convert(model, dict(given))
    except Exception:  # a library may choke on what is not its own in any way; then the refusal names what does not fit
        return None
    if converted is None or not all(isinstance(tensor, Tensor) for tensor in converted.values()):
        return None
    return library, converted


def _by_timm(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor] | None:
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return None if convert is None else dict(convert(given, model))


def _by_torchvision(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor] | None:
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    if not isinstance(model, VisionTransformer):
        return None
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
    """Position embeddings in the model's image size, by the function with which the library serves larger images."""
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

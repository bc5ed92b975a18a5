"""Weights from a file, or a refusal that names what does not fit."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitquant.errors import ModelError
from vitquant.zoo.failures import first_five, import_library, one_line
from vitquant.zoo.source import ModelSource


def pinned(source: ModelSource) -> ModelSource:
    """The source with the SHA-256 of its weights file; unchanged when there is no file.

    Raises:
        ModelError: the file cannot be read.
    """
    if source.weights in ("pretrained", "random"):
        return source
    return replace(source, weights_sha256=_sha256(Path(source.weights)))


def load_weights(model: nn.Module, source: ModelSource) -> None:
    path = Path(source.weights)
    if source.weights_sha256 and (digest := _sha256(path)) != source.weights_sha256:
        raise ModelError(f"{path}: SHA-256 is {digest[:12]}..., not {source.weights_sha256[:12]}... as recorded")
    given, wanted = _read_state_dict(path), model.state_dict()
    problems = {
        "missing": [key for key in wanted if key not in given],
        "unexpected": [key for key in given if key not in wanted],
        "of another shape": [
            f"{key} {list(given[key].shape)} for {list(wanted[key].shape)}"
            for key in wanted
            if key in given and given[key].shape != wanted[key].shape
        ],
    }
    if any(problems.values()):
        said = "; ".join(f"{len(keys)} {what}: {first_five(keys)}" for what, keys in problems.items() if keys)
        raise ModelError(f"{path} does not fit {source.name}: {said}")
    model.load_state_dict(given)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"{path}: no such weights file (or write pretrained or random)")
    try:
        if path.suffix == ".safetensors":
            loaded: Any = import_library("safetensors.torch").load_file(path)
        elif path.suffix in (".pth", ".pt"):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise ModelError(f"{path}: weights are read from .safetensors, .pth and .pt files")
    except ModelError:
        raise
    except Exception as error:  # pickle, zip and safetensors have an error each
        raise ModelError(f"{path} cannot be read as weights, it may be truncated: {one_line(error)}") from error
    for key in ("model", "state_dict"):  # how the training scripts of DeiT and Swin save
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ModelError(f"{path} holds no state dict, which maps names to tensors")
    return loaded


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error

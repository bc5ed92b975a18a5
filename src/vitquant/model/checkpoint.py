"""Files of a saved model: written as a whole or not at all, and verified by their digests when read.

A checkpoint is a directory with `model.safetensors` and `config.json`. This module deals with tensors and
JSON only, not with models.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitquant.errors import CheckpointError
from vitquant.files import Directory, Layout, replacing, sha256
from vitquant.parsing import parse_json, read_file
from vitquant.schema import Integer, Table, Text, check

FORMAT = 2
TENSORS = "model.safetensors"
CONFIG = "config.json"
DIGEST = Text(64, "[0-9a-f]{64}")
FILES = Table({TENSORS: Table({"sha256": DIGEST, "bytes": Integer(0)})})
_LONGEST_CONFIG = 2**24  # bytes; the config of a ViT-g has 2**21


# Exports in the directory of a saved model were made from that model, so that replacing the model removes them.
EXPORTED: Layout = {
    "integer.program": None,
    "integer.onnx": None,
    "qdq.onnx": None,
    "openvino": {"model.xml": None, "model.bin": None, "digest.json": None},
}


def is_saved_model(directory: Path) -> bool:
    """Whether a directory's `config.json` is that of a saved model, and not a file of that name of another library."""
    try:
        config = json.loads((directory / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and {"format", "files", "digest"} <= config.keys()


SAVED_MODEL = Directory("saved model", {CONFIG: None, TENSORS: None, **EXPORTED}, is_saved_model, CheckpointError)


def write_checkpoint(
    directory: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], force: bool = False
) -> None:
    """Write a checkpoint atomically: the directory holds either all of it or its old content.

    Arguments:
        directory: created, with its parents, when missing.
        tensors: by name, on any device.
        config: plain JSON values; `format`, `files` and `digest` are added.
        force: replace an existing checkpoint.

    Raises:
        CheckpointError: see `vitquant.files.replacing`.
    """
    save_file = _safetensors().save_file
    from safetensors import SafetensorError  # raised instead of OSError, as for a full disk

    with replacing(directory, force, SAVED_MODEL) as new:
        try:
            new.mkdir()
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, new / TENSORS)
            files = {TENSORS: {"sha256": sha256(new / TENSORS), "bytes": (new / TENSORS).stat().st_size}}
            whole = {"format": FORMAT, **config, "files": files}
            text = json.dumps({**whole, "digest": _digest(whole)}, indent=2)
            (new / CONFIG).write_text(text + "\n", encoding="utf-8")
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{directory} could not be written: {reason}") from error


def read_checkpoint(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a checkpoint, verifying the digests of both files.

    Returns:
        the tensors by name, on the CPU, and the config.

    Raises:
        CheckpointError: a file is missing, truncated, altered, or of another format; the message names the file.
    """
    config = read_config(directory)
    path = _tensors_file(directory, config)
    if sha256(path) != config["files"][TENSORS]["sha256"]:
        raise CheckpointError(f"{path} was altered since it was saved: its sha256 differs; copy it again")
    try:
        return _safetensors().load_file(path), config
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_shapes(directory: Path, config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The shapes of a checkpoint's tensors by their names, without reading them.

    Arguments:
        config: from `read_config`.

    Raises:
        CheckpointError: the file is missing, truncated, or not a safetensors file.
    """
    path = _tensors_file(directory, config)
    _safetensors()
    import safetensors

    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _tensors_file(directory: Path, config: Mapping[str, Any]) -> Path:
    """The path of the tensors, after checking that the file exists and has the size that the config states."""
    path, written = directory / TENSORS, config["files"][TENSORS]["bytes"]
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is missing; the saved model is incomplete, save it again")
    if (found := path.stat().st_size) != written:
        raise CheckpointError(f"{path} holds {found} bytes of {written}: it was truncated; copy it again")
    return path


def read_config(directory: Path) -> dict[str, Any]:
    """The config of a checkpoint, checked against its own digest.

    Raises:
        CheckpointError: see `read_checkpoint`.
    """
    path = directory / CONFIG
    if not os.path.isdir(directory):
        raise CheckpointError(f"{directory} is no directory; give the one that `vitquant quantize` wrote")
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is missing: {directory} holds no saved model")
    try:
        config = parse_json(read_file(path, _LONGEST_CONFIG, CheckpointError), CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; copy it again") from None
    if not isinstance(config, dict) or type(config.get("format")) is not int:
        raise CheckpointError(f"{path} is not the config of a saved model: it has no format number")
    if config["format"] > FORMAT:
        raise CheckpointError(f"{path} has format {config['format']}, newer than {FORMAT}: update vitquant")
    if config["format"] < FORMAT:
        raise CheckpointError(f"{path} has format {config['format']}, older than {FORMAT}: quantize the model again")
    digest = config.pop("digest", None)
    if digest != _digest(config):
        raise CheckpointError(f"{path} was altered since it was saved: its digest differs; save the model again")
    check(config.get("files"), FILES, CheckpointError, f"{path}: files")
    return config


def digest_of(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> str:
    """One sha256, in hexadecimal, over tensors and plain JSON values, independent of the order of their names."""
    described = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    found = hashlib.sha256(_text({"tensors": described, "config": config}).encode())
    for name in sorted(tensors):
        found.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(config).encode()).hexdigest()


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True, separators=(",", ":"))


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError("saving and loading need safetensors: pip install 'vitquant[checkpoint]'") from error
    return safetensors.torch

"""Reading weights files, recognized by their content and not their extension, without running code from them."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import mmap
import os
import pathlib
import pickle
import re
import types
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vitquant.errors import ModelError
from vitquant.zoo.failures import import_library, one_line

_IN_A_DIRECTORY = (  # as transformers saves a model, in its order
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_ALONE = "save its state dict alone: torch.save(model.state_dict(), FILE)"
_FOREIGN = {
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself; run git lfs pull",
    b"\x89HDF": "is an HDF5 file of Keras or TensorFlow; convert it to PyTorch first",
    b"GGUF": "is a GGUF file, quantized by others; give the float weights",
    b"\x1f\x8b": "is compressed by gzip; unpack it first",
    b"<": "is a web page, not weights; the download went wrong, fetch the file itself",
    b"{": "is JSON, but no index of weights, which has a 'weight_map'",
}


def weight_files(path: Path) -> list[Path]:
    """The files that contain the weights: one, or an index and its shards, which are beside it.

    Arguments:
        path: a file, an index as transformers writes it (`model.safetensors.index.json`), or a directory with either.

    Raises:
        ModelError: there is no such file, or an index names a file that is not beside it.
    """
    if os.path.isdir(path):
        inside = next((path / name for name in _IN_A_DIRECTORY if os.path.isfile(path / name)), None)
        if inside is None:
            raise ModelError(f"{path} is a directory without {_IN_A_DIRECTORY[0]} or {_IN_A_DIRECTORY[2]}; give a file")
        path = inside
    if not os.path.isfile(path):
        raise ModelError(f"{path}: no such weights file (or write pretrained or random)")
    head = _head(path)
    if _is_safetensors(head) or not head.lstrip().startswith(b"{"):
        return [path]
    try:
        shards = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} {_FOREIGN[b'{']}") from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or not os.path.isfile(path.parent / shard):
            raise ModelError(f"{path} names the file {shard!r}, which is not beside it")
    return [path, *(path.parent / shard for shard in shards)]


def digest_of_weights(path: Path) -> str:
    """The SHA-256 of a weights file; for several files, that of their digests in order.

    Raises:
        ModelError: a file cannot be read.
    """
    digests = [_sha256(file) for file in weight_files(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def read_weights(path: Path) -> Any:
    """The content of a weights file: tensors in dictionaries, with plain values that training scripts save beside them.

    Arguments:
        path: see `weight_files`; a file of safetensors or `torch.save`, with any extension.

    Raises:
        ModelError: it is another kind of file, is damaged, or could run code when it is read.
    """
    files = weight_files(path)
    if len(files) == 1:
        return _read(files[0])
    parts = [_read(shard) for shard in files[1:]]
    if not all(isinstance(part, Mapping) for part in parts):
        raise ModelError(f"{path}: its shards hold no state dicts, which map names to tensors")
    return {name: tensor for part in parts for name, tensor in part.items()}


def _read(path: Path) -> Any:
    head = _head(path)
    try:
        if _is_safetensors(head):
            return import_library("safetensors.torch").load_file(path)
        if head[:4] == b"PK\x03\x04":
            if said := _foreign_archive(path):
                raise ModelError(f"{path} {said}")
            return _load(path)
        if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
            return _load(path)
    except ModelError:
        raise
    except Exception as error:  # pickle, zip and safetensors raise errors of their own
        raise ModelError(f"{path} cannot be read as weights, it may be truncated: {one_line(error)}") from error
    raise ModelError(f"{path} {_foreign_file(path, head)}")


def _load(path: Path) -> Any:
    """Load a file of `torch.save` without running code from its pickle."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"\nbytearray\n") >= 0:  # torch.load allocates any size that a file names
            raise ModelError(f"{path} holds a bytearray, which may be of any size; {_ALONE}")
    with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with path.open("rb") as file:  # given a path, torch would go by the extension
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"[Uu]nsupported class ([\w.]+)", str(error))
            if named is not None:
                what = f"holds more than tensors, and reading it could run code, by {named[1]}"
            elif isinstance(error, pickle.UnpicklingError) and "nsupported operand" in str(error):
                what = "was pickled by another protocol than torch.save's own, or not by torch.save"
            elif isinstance(error, pickle.UnpicklingError) and "Weights only load failed" in str(error):
                reason = " ".join(str(error).partition("WeightsUnpickler error: ")[2].split())
                what = f"holds more than tensors: {reason[:150] or 'what torch.load does not take'}"
            else:
                raise
            raise ModelError(f"{path} {what}; {_ALONE}") from error


def _harmless() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """Classes of plain values that training scripts save beside weights, whose construction runs no code of a file."""
    # Not range: a set of a large one fills the memory.
    allowed: list[Any] = [argparse.Namespace, types.SimpleNamespace, frozenset, slice]
    allowed += [datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone]
    for module in ("pathlib", "pathlib._local"):  # the second is its name in Python 3.13
        allowed += [(pathlib.PurePosixPath, f"{module}.{name}") for name in ("PosixPath", "PurePosixPath")]
        allowed += [(pathlib.PureWindowsPath, f"{module}.{name}") for name in ("WindowsPath", "PureWindowsPath")]
    try:
        import numpy as np
    except ImportError:
        return allowed
    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # the second is its name since numpy 2
        allowed += [(scalar, f"{module}.scalar"), (rebuild, f"{module}._reconstruct")]
    return [*allowed, np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdFDSU")]


def _foreign_archive(path: Path) -> str | None:
    """The description of a zip archive that `torch.save` did not write; None if it did."""
    with zipfile.ZipFile(path) as archive:
        names, parts = archive.namelist(), archive.infolist()
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        return f"is a TorchScript archive; {_ALONE}, of the module it was made from or of torch.jit.load(FILE)"
    if any(name.endswith(("data.pkl", "data.pkl/")) for name in names):
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            return "is a compressed archive, which torch.save does not write; unpack it, or save the weights again"
        if sum(part.file_size for part in parts) > path.stat().st_size:
            return "is damaged: its parts are larger than the file"
        return None
    if any("models/" in name or name.endswith("serialized_exported_program.json") for name in names):
        return f"is an exported program; {_ALONE}, of the module it was made from or of torch.export.load(FILE)"
    if any(name.endswith(".npy") for name in names):
        return f"is a numpy archive; load it by its library (timm: model.load_pretrained(FILE)), and {_ALONE}"
    return "is a zip archive of other files; unpack it first"


def _foreign_file(path: Path, head: bytes) -> str:
    """The description of a file in a format that cannot be read."""
    if not head:
        return "is empty"
    for start, said in _FOREIGN.items():
        if head.lstrip().startswith(start):
            return said
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and b"pytorch" in head):
        return "is an ONNX model; give the weights of the PyTorch model it was exported from"
    if head[257:262] == b"ustar":
        return "is a tar archive; unpack it first (weights of PyTorch before 0.4: load and save them by torch < 2)"
    return "is in no format that is known here; give safetensors, or what torch.save wrote"


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins with a plausible length and an opening brace; in a text the length would be huge."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error

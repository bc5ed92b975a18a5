"""The trained model and the CIFAR-10 images that ship in the package; README.md says where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from vitquant.errors import DataError
from vitquant.files import Directory, replacing
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.zoo import ModelSource, create, pinned
from vitquant.zoo.failures import import_library

if TYPE_CHECKING:
    from torch import Tensor, nn

ARCHITECTURE = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3, "num_classes": 10}
PREPROCESSING = Preprocessing(
    input_size=(3, 32, 32), crop_pct=1.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
)

Split = Literal["test", "train"]
_FOLDER = Path(__file__).parent
_LISTING = "labels.csv"
_SIZE = 32
_BYTES = 3 * _SIZE * _SIZE  # of one image, which is one row of a sheet


def source() -> ModelSource:
    """The source of the float model: timm's plain Vision Transformer with the weights beside this file.

    It is given by timm's own name, so that models quantized from it can be loaded without naming a factory again.
    """
    return pinned(ModelSource("timm:vit_tiny_patch16_224", ARCHITECTURE, str(_FOLDER / "weights.safetensors")))


def model() -> nn.Module:
    """The float model, in eval mode and float32.

    Raises:
        ModelError: timm or safetensors is not installed, or the weights are not in the package.
    """
    return create(source())


def batches(split: Split, size: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of normalized images, float32 (size, 3, 32, 32), with their classes; the last batch may be smaller.

    Raises:
        ModelError: Pillow is not installed.
    """
    pixels = torch.frombuffer(bytearray(_pixels(split)), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    images = (pixels.view(-1, _SIZE, _SIZE, 3).permute(0, 3, 1, 2).float() / 255 - mean) / std
    return list(zip(images.split(size), torch.tensor(_labels(split)).split(size), strict=True))


def folder_of_images() -> Directory:
    """The kind of directory that `write_folder` writes."""
    names = [_LISTING, *(_file(number) for number in range(len(_labels("test"))))]
    return Directory("folder of the demo's images", dict.fromkeys(names), _is_ours, DataError)


def write_folder(folder: Path) -> None:
    """Write the test images in the form that `vitquant evaluate --data` reads: a PNG file each, and a labels.csv.

    A folder that an earlier call wrote is replaced.

    Raises:
        DataError: the folder is a file, holds something else, or cannot be written.
    """
    image, pixels = import_library("PIL.Image"), _pixels("test")
    with replacing(folder, True, folder_of_images()) as new:
        try:
            new.mkdir()
            (new / _LISTING).write_text(_listing(), encoding="utf-8")
            for number in range(len(pixels) // _BYTES):
                row = pixels[number * _BYTES : (number + 1) * _BYTES]
                image.frombytes("RGB", (_SIZE, _SIZE), row).save(new / _file(number))
        except OSError as error:
            raise DataError(f"{folder} cannot be written: {error.strerror or error}") from error


def _is_ours(folder: Path) -> bool:
    try:
        return (folder / _LISTING).read_text(encoding="utf-8", errors="replace") == _listing()
    except OSError:
        return False


def _pixels(split: Split) -> bytes:
    with import_library("PIL.Image").open(_FOLDER / f"{split}.png") as sheet:
        return sheet.convert("RGB").tobytes()


def _labels(split: Split) -> list[int]:
    return json.loads((_FOLDER / "labels.json").read_text(encoding="utf-8"))[split]


def _listing() -> str:
    rows = (f"{_file(number)},{label}" for number, label in enumerate(_labels("test")))
    return "\n".join(["file,class_index", *rows]) + "\n"


def _file(number: int) -> str:
    return f"{number:04}.png"

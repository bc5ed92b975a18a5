"""Preprocessing of an image to a model's input, with the keys of timm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from vitquant.errors import DataError
from vitquant.parsing import parse_toml, read_file
from vitquant.schema import Flag, Integer, ListOf, Number, Table, Text, check

if TYPE_CHECKING:
    from PIL.Image import Image

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
LARGEST_RESIZE = 8192  # pixels of a side, before the crop
LARGEST_RESIZED = 2**28  # pixels of an image while it is resized, 1 GiB in Pillow
_LONGEST = 2**16  # bytes of a file
_SCHEMA = Table(
    {},
    {
        "input_size": ListOf(Integer(1, 4096), 3, 3),
        "interpolation": Text(among=INTERPOLATIONS),
        "crop_pct": Number(0.01, 1.0),
        "mean": ListOf(Number(-1000, 1000), 3, 3),
        "std": ListOf(Number(1e-3, 1000), 3, 3),
        "crop_mode": Text(among=CROP_MODES),
        "exif_orientation": Flag(),
    },
)


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalization of one model's input; the keys are those of timm's data configuration.

    The image is resized to `floor(size / crop_pct)`, cropped to `size` and normalized. The defaults are
    the common ones for ImageNet: resize to 256, bicubic, centre crop 224.

    Arguments:
        input_size: (3, height, width).
        interpolation: one of `INTERPOLATIONS`.
        crop_pct: the side of the crop relative to the resized image, from 0.01 to 1.
        mean, std: per colour, of pixels in [0, 1]; std is at least 0.001.
        crop_mode: `center` keeps the aspect ratio, `squash` does not, `border` pads.
        exif_orientation: whether to rotate photographs by their EXIF orientation, which timm and torchvision do not do;
            timm has no such key.

    Raises:
        DataError: a value has the wrong type or is out of range; the message names the key.

    Pitfall: for DeiT, timm's `crop_pct` is 0.9 (resize to 248), and that of the paper 0.875 (resize to 256).
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    crop_mode: str = "center"
    exif_orientation: bool = False

    def __post_init__(self) -> None:
        check(vars(self), _SCHEMA, DataError, "preprocessing")
        for key in ("input_size", "mean", "std"):  # JSON and TOML give lists
            object.__setattr__(self, key, tuple(getattr(self, key)))
        if self.input_size[0] != 3:
            raise DataError(f"preprocessing: input_size must be [3, height, width], not {list(self.input_size)}")
        if max(self.input_size) / self.crop_pct > LARGEST_RESIZE:
            raise DataError(
                f"preprocessing: input_size {list(self.input_size)} and crop_pct {self.crop_pct} resize images to more "
                f"than {LARGEST_RESIZE} pixels"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], base: Preprocessing | None = None) -> Preprocessing:
        """Read what `to_dict` returned; missing keys are taken from `base`.

        Raises:
            DataError: a key is unknown, or a value is not valid.
        """
        check(values, _SCHEMA, DataError, "preprocessing")
        return replace(base or cls(), **values)

    @classmethod
    def from_toml(cls, path: str | Path, base: Preprocessing | None = None) -> Preprocessing:
        """Read a TOML file with some or all keys; the others are taken from `base`, or the defaults.

        Raises:
            DataError: the file cannot be read, a key is unknown, or a value is not valid.
        """
        try:
            return cls.from_dict(parse_toml(read_file(Path(path), _LONGEST, DataError), DataError), base)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The keys and values as plain values for JSON and TOML."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def transform(self) -> Callable[[Image], Tensor]:
        """A callable from a PIL image to a normalized float32 tensor of `input_size`.

        Raises:
            DataError: timm is not installed.

        Pitfall: it neither rotates an image nor converts it to RGB, which `tasks.decoding` does. For an image that
            `check_size` refuses, it fails or takes gigabytes.
        """
        try:
            from timm.data import create_transform
        except ImportError as error:
            raise DataError("preprocessing images needs timm: pip install vitquant[timm]") from error
        steps = {key: value for key, value in asdict(self).items() if key != "exif_orientation"}
        return create_transform(**steps, is_training=False)  # pyright: ignore[reportReturnType]

    def framed(self, pixels: Tensor) -> Image:
        """An image that `transform` gives back as these pixels, normalized.

        Where an image is resized and cropped, the pixels get a frame that repeats those at its edges, so that it has
        the size to which images are resized, and the crop takes the frame away.

        Arguments:
            pixels: uint8, of `input_size`.

        Raises:
            DataError: Pillow is not installed, or the pixels have another size.
        """
        try:
            from PIL.Image import fromarray
        except ImportError as error:
            raise DataError("images need Pillow: pip install vitquant[timm]") from error
        if tuple(pixels.shape) != self.input_size:
            raise DataError(f"an image of {list(pixels.shape)} where {list(self.input_size)} are taken")
        frame: list[int] = []
        for size in reversed(self.input_size[1:]):  # torch names the last axis first
            more = math.floor(size / self.crop_pct) - size
            before = round(more / 2)  # as torchvision's crop rounds
            frame += [before, more - before]
        wide = functional.pad(pixels[None].float(), frame, mode="replicate")[0].to(torch.uint8)
        return fromarray(wide.permute(1, 2, 0).contiguous().numpy())

    def check_size(self, width: int, height: int) -> None:
        """Refuse an image that is so narrow that one side becomes 0 when it is resized, or the other enormous.

        Arguments:
            width, height: of the image, in pixels.

        Raises:
            DataError: the image is too narrow; the message names its size before and after resizing.
        """
        sizes = [math.floor(size / self.crop_pct) for size in self.input_size[1:]]
        high, wide = sizes
        if self.crop_mode != "squash":
            choose = max if self.crop_mode == "border" else min
            ratio = choose(side / size for side, size in zip((height, width), sizes, strict=True))
            high, wide = round(height / ratio), round(width / ratio)
        if not min(wide, high):
            raise DataError(f"{width} x {height} pixels are too narrow: resized to {wide} x {high}, nothing is left")
        if wide * max(high, height) > LARGEST_RESIZED:  # Pillow resizes horizontally first, then vertically
            raise DataError(
                f"{width} x {height} pixels are too narrow: resizing them to {wide} x {high} takes more than "
                f"{LARGEST_RESIZED} pixels"
            )

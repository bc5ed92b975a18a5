"""How an image becomes a model's input, in timm's words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitquant.errors import DataError
from vitquant.parsing import parse_toml, read_file
from vitquant.schema import Flag, Integer, ListOf, Number, Table, Text, check

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
LARGEST_RESIZE = 8192  # pixels of a side, before the crop
LARGEST_RESIZED = 2**28  # pixels of an image while it is resized; Pillow holds them in 1 GiB
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

    The image is resized to `floor(size / crop_pct)`, cut to `size` and normalized. Without arguments
    it is the common ImageNet one: 256 bicubic, centre crop 224.

    Arguments:
        input_size: (3, height, width).
        interpolation: one of `INTERPOLATIONS`.
        crop_pct: share of the resized image that the crop keeps, from 0.01 to 1.
        mean, std: per colour, of pixels in [0, 1]; std is at least 0.001.
        crop_mode: `center` keeps the aspect ratio, `squash` does not, `border` pads.
        exif_orientation: turn photographs as their EXIF data says; timm and torchvision do not. No key of timm's.

    Raises:
        DataError: a value has the wrong type or is out of range; the key is named.

    Pitfall: timm's own `crop_pct` of DeiT is 0.9 (resize 248), its paper's 0.875 (resize 256).
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
        """Read what `to_dict` wrote; keys that are absent are those of `base`.

        Raises:
            DataError: an unknown key or a bad value.
        """
        check(values, _SCHEMA, DataError, "preprocessing")
        return replace(base or cls(), **values)

    @classmethod
    def from_toml(cls, path: str | Path, base: Preprocessing | None = None) -> Preprocessing:
        """Read a TOML file of some or all keys; the others are those of `base`, or the ImageNet ones.

        Raises:
            DataError: the file cannot be read, or holds an unknown key or a bad value.
        """
        try:
            return cls.from_dict(parse_toml(read_file(Path(path), _LONGEST, DataError), DataError), base)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The keys and values, as JSON and TOML hold them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def transform(self) -> Callable[[Image], Tensor]:
        """A callable from a PIL image to a normalized float32 tensor of `input_size`.

        Raises:
            DataError: timm is not installed.

        Pitfall: it neither turns an image nor converts it to RGB; `tasks.decoding` does. Where `check_size` refuses an
            image, it fails or takes gigabytes.
        """
        try:
            from timm.data import create_transform
        except ImportError as error:
            raise DataError("preprocessing images needs timm: pip install vitquant[timm]") from error
        steps = {key: value for key, value in asdict(self).items() if key != "exif_orientation"}
        return create_transform(**steps, is_training=False)  # pyright: ignore[reportReturnType]

    def check_size(self, width: int, height: int) -> None:
        """Refuse an image that is so narrow that resizing leaves nothing of it, or makes it enormous.

        Arguments:
            width, height: of the image, in pixels.

        Raises:
            DataError: it says the size, before and after.
        """
        sizes = [math.floor(size / self.crop_pct) for size in self.input_size[1:]]
        high, wide = sizes
        if self.crop_mode != "squash":
            choose = max if self.crop_mode == "border" else min
            ratio = choose(side / size for side, size in zip((height, width), sizes, strict=True))
            high, wide = round(height / ratio), round(width / ratio)
        if not min(wide, high):
            raise DataError(f"{width} x {height} pixels are too narrow: resized to {wide} x {high}, nothing is left")
        if wide * max(high, height) > LARGEST_RESIZED:  # Pillow resizes all rows first, and the columns of that
            raise DataError(
                f"{width} x {height} pixels are too narrow: resizing them to {wide} x {high} takes more than "
                f"{LARGEST_RESIZED} pixels"
            )

"""How an image becomes a model's input, in timm's words."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitquant.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalization of one model's input; the keys are those of timm's data configuration.

    The image is resized to `floor(size / crop_pct)`, cut to `size` and normalized. Without arguments
    it is the common ImageNet one: 256 bicubic, centre crop 224.

    Arguments:
        input_size: (3, height, width).
        interpolation: one of `INTERPOLATIONS`.
        crop_pct: share of the resized image that the crop keeps, in (0, 1].
        mean, std: per colour, of pixels in [0, 1].
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
        for key in ("input_size", "mean", "std"):  # JSON and TOML give lists
            value = getattr(self, key)
            if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(_is_number, value)):
                raise DataError(f"preprocessing: {key} must be three numbers, not {value!r}")
            object.__setattr__(self, key, tuple(value))
        if not all(isinstance(size, int) and size > 0 for size in self.input_size) or self.input_size[0] != 3:
            raise DataError(f"preprocessing: input_size must be [3, height, width], not {list(self.input_size)}")
        if not _is_number(self.crop_pct) or not 0 < self.crop_pct <= 1:
            raise DataError(f"preprocessing: crop_pct must be above 0 and at most 1, not {self.crop_pct!r}")
        if not isinstance(self.exif_orientation, bool):
            raise DataError(f"preprocessing: exif_orientation must be true or false, not {self.exif_orientation!r}")
        if min(self.std) <= 0:
            raise DataError(f"preprocessing: std must be above 0, not {list(self.std)}")
        for key, allowed in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            if getattr(self, key) not in allowed:
                raise DataError(f"preprocessing: {key} must be one of {', '.join(allowed)}, not {getattr(self, key)!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], base: Preprocessing | None = None) -> Preprocessing:
        """Read what `to_dict` wrote; keys that are absent are those of `base`.

        Raises:
            DataError: an unknown key or a bad value.
        """
        allowed = [field.name for field in fields(cls)]
        if unknown := [key for key in values if key not in allowed]:
            raise DataError(f"preprocessing: unknown key {unknown[0]!r}; the keys are {', '.join(allowed)}")
        return replace(base or cls(), **values)

    @classmethod
    def from_toml(cls, path: str | Path, base: Preprocessing | None = None) -> Preprocessing:
        """Read a TOML file of some or all keys; the others are those of `base`, or the ImageNet ones.

        Raises:
            DataError: the file cannot be read, or holds an unknown key or a bad value.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as TOML: {error}") from error
        try:
            return cls.from_dict(values, base)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The keys and values, as JSON and TOML hold them."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def transform(self) -> Callable[[Image], Tensor]:
        """A callable from a PIL image to a normalized float32 tensor of `input_size`.

        Raises:
            DataError: timm is not installed.

        Pitfall: it neither turns an image nor converts it to RGB; `tasks.decoding` does.
        """
        try:
            from timm.data import create_transform
        except ImportError as error:
            raise DataError("preprocessing images needs timm: pip install vitquant[timm]") from error
        steps = {key: value for key, value in asdict(self).items() if key != "exif_orientation"}
        return create_transform(**steps, is_training=False)  # pyright: ignore[reportReturnType]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")

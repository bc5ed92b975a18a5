"""Decoding of image files to 8-bit RGB: the supported formats, and the conversion of each kind of pixel."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from vitquant.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

# Formats that Pillow decodes by itself, and refuses if truncated. EPS, for example, would start Ghostscript.
FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "JPEG2000", "GIF", "TIFF", "BMP", "DIB"),
    *("PPM", "TGA", "QOI", "SGI", "PCX"),
)
_WHITE_IS_ZERO, _PHOTOMETRIC, _BITS_PER_SAMPLE = 0, 262, 258  # of TIFF


def readable_endings() -> frozenset[str]:
    """The file extensions, in lower case with the dot, that the installed Pillow can decode.

    HEIC is among them after a call of `pillow_heif.register_heif_opener()`.

    Raises:
        DataError: Pillow is not installed.
    """
    pillow = _pillow()
    return frozenset(ending for ending, name in pillow.registered_extensions().items() if name in FORMATS)


def decode(path: str | Path, exif_orientation: bool = False) -> Image:
    """The first frame of an image file as 8-bit RGB.

    Modes are converted to RGB as in Pillow and torchvision: transparency is dropped. Greyscale of more than 8 bits,
    which Pillow would clip to white, is scaled from its whole range instead.

    Arguments:
        exif_orientation: whether to rotate the image by its EXIF orientation. Pillow always rotates TIFF files.

    Raises:
        DataError: Pillow is not installed, or pixels are floats or 32-bit integers, whose range is not known.
        Exception: whatever Pillow raises for a file that it cannot decode.
    """
    from PIL import ImageOps

    pillow = _pillow()
    with pillow.open(path, formats=[name for name in FORMATS if name in pillow.OPEN]) as file:
        image = ImageOps.exif_transpose(file) if exif_orientation else file
        if file.mode.startswith("I;16") or (file.mode == "I" and file.format in ("PNG", "PPM")):
            image = _scaled(image, getattr(file, "tag_v2", {}))
        elif file.mode in ("I", "F"):
            kind = "floats" if file.mode == "F" else "32-bit integers"
            raise DataError(f"its pixels are {kind}, of no known range; convert it to 8 or 16 bits")
        return image.convert("RGB")


def _scaled(image: Image, tags: dict[int, object]) -> Image:
    """8-bit greyscale of greyscale with more bits; 0 stays 0, and the largest value becomes 255."""
    import numpy
    from PIL.Image import fromarray

    bits = tags.get(_BITS_PER_SAMPLE, 16)
    top = 2 ** (bits[0] if isinstance(bits, tuple) else int(str(bits))) - 1
    values = numpy.asarray(image).astype(numpy.int64)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = top - values
    return fromarray(((255 * values + top // 2) // top).astype(numpy.uint8))


def _pillow() -> ModuleType:
    """Pillow with all of its formats registered."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("images need Pillow: pip install vitquant[timm]") from error
    Image.init()
    return Image

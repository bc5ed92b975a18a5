"""Every kind of pixel becomes the RGB that it stands for, or is refused; nothing becomes white without a word."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from vitquant.errors import DataError
from vitquant.tasks.decoding import decode, readable_endings
from vitquant.tasks.images import Item, batches
from vitquant.tasks.preprocessing import Preprocessing

FEW = settings(max_examples=20, deadline=None)

RAMP = np.array([[0, 1, 128, 129, 256, 257, 1000, 32767, 32768, 65278, 65534, 65535]], dtype=np.uint16)
GREY = np.array([[0, 0, 0, 1, 1, 1, 4, 127, 128, 254, 255, 255]], dtype=np.uint8)  # of it, nearest to 255/65535


def grey(path):
    pixels = np.asarray(decode(path))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def big_endian_tiff(values, photometric=1, bits=16):
    """One strip without compression."""
    tags = [(256, 3, values.shape[1]), (257, 3, values.shape[0]), (258, 3, bits), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 200), (277, 3, 1), (278, 3, values.shape[0]), (279, 4, 2 * values.size)]
    entries = [
        struct.pack(">HHI", tag, kind, 1) + (struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value))
        for tag, kind, value in tags
    ]
    head = b"MM\0*" + struct.pack(">IH", 8, len(tags)) + b"".join(entries) + b"\0" * 4
    return head.ljust(200, b"\0") + values.astype(">u2").tobytes()


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_16_bit_greyscale_is_scaled(tmp_path, ending):
    Image.fromarray(RAMP).save(tmp_path / f"x.{ending}")
    assert (grey(tmp_path / f"x.{ending}") == GREY).all()


@pytest.mark.parametrize(("photometric", "expected"), [(1, GREY), (0, 255 - GREY)])
def test_16_bit_tiff_of_another_byte_order_and_meaning(tmp_path, photometric, expected):
    if photometric == 1:
        (tmp_path / "x.tif").write_bytes(big_endian_tiff(RAMP))
    else:  # white is zero
        Image.fromarray(RAMP).save(tmp_path / "x.tif", tiffinfo={262: 0})
    assert (grey(tmp_path / "x.tif") == expected).all()


def test_a_pgm_of_fewer_bits_uses_its_whole_range(tmp_path):
    (tmp_path / "x.pgm").write_bytes(b"P5 3 1 1023\n" + np.array([0, 512, 1023], ">u2").tobytes())
    assert grey(tmp_path / "x.pgm").tolist() == [[0, 128, 255]]


@FEW
@given(st.integers(0, 255), st.sampled_from(["png", "tif"]))
def test_16_bits_that_are_8_bits_repeated_are_those_8_bits(tmp_path_factory, value, ending):
    path = tmp_path_factory.mktemp("grey") / f"x.{ending}"
    Image.fromarray(np.full((2, 2), 257 * value, dtype=np.uint16)).save(path)
    assert (grey(path) == value).all()


@pytest.mark.parametrize(("kind", "said"), [(np.float32, "floats"), (np.int32, "32-bit integers")])
def test_pixels_without_a_known_range_are_refused(tmp_path, kind, said):
    Image.fromarray(np.ones((4, 4), dtype=kind)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=said):
        decode(tmp_path / "x.tif")
    with pytest.raises(
        DataError, match=rf"1 of the first 1 images cannot be read \(first: .*x\.tif: its pixels are {said}"
    ):
        list(batches([Item(tmp_path / "x.tif")], Preprocessing(), 1))


def drawing(mode):
    image = Image.new("RGB", (32, 32), (250, 40, 10))
    ImageDraw.Draw(image).ellipse((4, 4, 20, 20), fill=(20, 200, 90))
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize((32, 32)))
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "ending"),
    [
        *(("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGB", "png"), ("RGBA", "png")),
        *(("CMYK", "tif"), ("YCbCr", "tif"), ("PA", "tif"), ("P", "gif"), ("RGBA", "webp"), ("CMYK", "jpg")),
    ],
)
def test_8_bit_modes_are_what_pillow_makes_of_them(tmp_path, mode, ending):
    drawing(mode if mode != "PA" else "LA").save(tmp_path / f"x.{ending}")
    with Image.open(tmp_path / f"x.{ending}") as image:
        expected = np.asarray(image.convert("RGB"))
    found = np.asarray(decode(tmp_path / f"x.{ending}"))
    assert (found == expected).all()
    if mode not in ("1", "L", "LA", "PA"):  # the colours of the drawing
        assert abs(found[0, 0].astype(int) - (250, 40, 10)).max() < 60


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_a_palette_with_transparency_keeps_its_colours(tmp_path):
    image = drawing("P")
    image.save(tmp_path / "x.png", transparency=bytes([0] * 256))
    assert (np.asarray(decode(tmp_path / "x.png")) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("ending", ["gif", "webp", "tif", "png"])
def test_the_first_frame_counts(tmp_path, ending):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:], lossless=True)
    red, _, blue = np.asarray(decode(tmp_path / f"x.{ending}"))[8, 8]
    assert red > 240
    assert blue < 15


SAVED = {
    *(".jpg", ".jfif", ".jpe", ".png", ".apng", ".webp", ".avif", ".jp2", ".gif", ".tif", ".bmp", ".dib"),
    *(".ppm", ".pgm", ".tga", ".qoi", ".sgi", ".pcx"),
}


@pytest.mark.parametrize("ending", sorted(SAVED))
def test_an_ending_that_is_listed_is_read_and_refused_when_it_is_cut(tmp_path, ending):
    if ending not in readable_endings():
        pytest.skip(f"this Pillow does not read {ending}")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = tmp_path / f"x{ending}"
    try:
        Image.fromarray(noise).convert("L" if ending == ".pgm" else "RGB").save(path)
    except (OSError, ValueError, KeyError):
        pytest.skip(f"this Pillow does not write {ending}")
    assert decode(path).size == (40, 40)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match="cannot be read") as caught:
        list(batches([Item(path)], Preprocessing(), 1))
    assert "\n" not in str(caught.value)


def test_formats_that_start_programs_are_not_opened(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.jpg")
    with pytest.raises(DataError, match="cannot identify image file"):
        list(batches([Item(tmp_path / "x.jpg")], Preprocessing(), 1))
    assert not {".eps", ".ps", ".pdf", ".h5", ".wmf", ".mpg"} & readable_endings()


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(DataError, match="decompression bomb"):
        list(batches([Item(tmp_path / "x.png")], Preprocessing(), 1))


TURNS = {1: 0, 3: 180, 6: 270, 8: 90}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_exif_orientation_is_ignored_unless_it_is_asked_for(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 8))
    image.save(tmp_path / f"x.{ending}", exif=exif)
    levels = {
        honoured: np.asarray(decode(tmp_path / f"x.{ending}", honoured)).astype(int)[..., 0]
        for honoured in (False, True)
    }
    assert abs(levels[False] - np.asarray(image)[..., 0]).max() < 20
    turned = np.asarray(image.rotate(TURNS[orientation], expand=True))[..., 0]
    assert levels[True].shape == turned.shape
    assert abs(levels[True] - turned).max() < 20


def test_the_preprocessing_says_whether_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    image = Image.new("L", (8, 8))
    image.paste(255, (0, 0, 8, 4))
    image.save(tmp_path / "x.png", exif=exif)
    plain = Preprocessing((3, 8, 8), crop_pct=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert Preprocessing.from_dict(plain.to_dict()) == plain
    assert not plain.exif_orientation
    for turned in (False, True):
        steps = Preprocessing.from_dict({**plain.to_dict(), "exif_orientation": turned})
        [(images, _)] = batches([Item(tmp_path / "x.png")], steps, 1)
        assert images[0, 0, 0, 0] == (0 if turned else 1)
    with pytest.raises(DataError, match="exif_orientation .*1"):
        Preprocessing(exif_orientation=1)  # type: ignore[arg-type]

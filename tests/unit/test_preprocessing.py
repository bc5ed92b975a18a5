import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitquant.errors import DataError
from vitquant.tasks.preprocessing import CROP_MODES, INTERPOLATIONS, Preprocessing
from vitquant.zoo import ModelSource, architecture, preprocessing_of
from vitquant.zoo.preprocessing import _crop_pct


@pytest.fixture
def photograph() -> Image.Image:
    """Smooth, coloured and far from square, so that squashing, cropping and swapped channels all show."""
    y, x = np.mgrid[0:300, 0:420]
    rgb = np.stack([127 + 120 * np.sin(x / 23), x * 255 / 420, y * 255 / 300], axis=-1)
    return Image.fromarray(rgb.astype(np.uint8))


def test_a_toml_file_overrides_some_keys_and_keeps_the_others(tmp_path):
    (tmp_path / "p.toml").write_text('input_size = [3, 192, 256]\nmean = [0.5, 0.5, 0.5]\ncrop_mode = "squash"\n')
    read = Preprocessing.from_toml(tmp_path / "p.toml", base=Preprocessing(crop_pct=1, interpolation="bilinear"))
    assert read == Preprocessing((3, 192, 256), "bilinear", 1, (0.5, 0.5, 0.5), crop_mode="squash")
    assert Preprocessing.from_dict(read.to_dict()) == read


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("crop = 0.9", "unknown key 'crop'.*crop_pct"),
        ("input_size = 224", "input_size"),
        ("input_size = [1, 28, 28]", "input_size"),
        ("input_size = [3, 224.0, 224]", "input_size"),
        ("crop_pct = 0", "crop_pct"),
        ('crop_pct = "0.9"', "crop_pct"),
        ("crop_pct = true", "crop_pct"),
        ("mean = [0.5, 0.5]", "mean"),
        ("mean = [0.5, 0.5, nan]", "mean"),
        ("std = [0.2, 0.0, 0.2]", "std"),
        ('interpolation = "cubic"', "interpolation: unknown .cubic.; did you mean .bicubic"),
        ("interpolation = 3", "interpolation"),
        ('crop_mode = ["center"]', "crop_mode"),
        ("mean = [", "TOML"),
        ("std = [0.2, 1e-320, 0.2]", "std"),
        ("crop_pct = 1e-9", "crop_pct"),
        ("input_size = [3, 100000, 100000]", "input_size"),
        ("input_size = [3, 4000, 4000]\ncrop_pct = 0.1", "resize images to more than"),
        ("mean = " + "[" * 5000, "nested"),
        ("crop_pct = 0." + "1" * 70000, "no such file has more"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_key(tmp_path, text, said):
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(DataError, match=f"bad.toml.*{said}"):
        Preprocessing.from_toml(tmp_path / "bad.toml")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_that_an_editor_of_windows_saved_is_read_or_refused_by_name(tmp_path, encoding):
    (tmp_path / "p.toml").write_text("crop_pct = 0.9\n", encoding=encoding)
    if encoding == "utf-8-sig":
        assert Preprocessing.from_toml(tmp_path / "p.toml") == Preprocessing(crop_pct=0.9)
    else:
        with pytest.raises(DataError, match=r"p\.toml: not valid TOML: .* save it as UTF-8"):
            Preprocessing.from_toml(tmp_path / "p.toml")


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"absent\.toml"):
        Preprocessing.from_toml(tmp_path / "absent.toml")


def test_the_transform_normalizes_and_sizes():
    grey = Image.new("RGB", (300, 260), (51, 51, 51))
    result = Preprocessing((3, 96, 128), mean=(0.1, 0.2, 0.3), std=(0.1, 0.2, 0.5)).transform()(grey)
    assert result.shape == (3, 96, 128)
    torch.testing.assert_close(result[:, 40, 40], torch.tensor([1.0, 0.0, -0.2]), atol=1e-6, rtol=0)


def is_refused(steps, width, height):
    try:
        steps.check_size(width, height)
    except DataError:
        return True
    return False


@pytest.mark.parametrize("size", [(3, 8, 8), (3, 8, 20)])
@pytest.mark.parametrize("crop_mode", CROP_MODES)
def test_a_size_is_refused_where_the_transform_fails_or_gives_too_many_pixels(crop_mode, size, monkeypatch):
    steps, resized = Preprocessing(size, crop_pct=0.7, crop_mode=crop_mode), []
    resize = Image.Image.resize

    def watched(image, size, *arguments, **options):
        resized.append(size[0] * max(size[1], image.height))
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr("vitquant.tasks.preprocessing.LARGEST_RESIZED", 5000)
    monkeypatch.setattr(Image.Image, "resize", watched)
    transform, seen = steps.transform(), set()
    for long in range(1, 200, 3):
        for width, height in ((1, long), (long, 1), (2, 5 * long)):
            resized.clear()
            try:
                transform(Image.new("RGB", (width, height)))
                expected = max(resized, default=0) > 5000
            except ValueError:
                expected = True
            assert is_refused(steps, width, height) is expected, (width, height)
            seen.add(expected)
    assert seen == {False, True}


@pytest.mark.parametrize("size", [(20_000, 2_000), (2_000, 20_000), (1, 1), (40_000, 400), (1, 1000)])
def test_panoramas_are_no_enormous_images(size):
    Preprocessing().check_size(*size)


def test_the_crop_share_gives_back_every_resize():
    for crop in range(32, 600, 7):
        for resized in range(crop, 2 * crop):
            assert math.floor(crop / _crop_pct(crop, resized)) == resized


@pytest.mark.parametrize("model_type", ["vit", "deit", "levit", "dinov2", "swin"])
def test_a_transformers_default_does_what_the_librarys_processor_does(model_type, photograph):
    from transformers import IMAGE_PROCESSOR_MAPPING

    source = ModelSource(f"transformers:{model_type}", weights="random")
    model = architecture(source)
    classes = IMAGE_PROCESSOR_MAPPING[type(model.config)]
    expected = torch.as_tensor(classes["pil"]()(photograph, return_tensors="pt")["pixel_values"][0])
    torch.testing.assert_close(preprocessing_of(model, source).transform()(photograph), expected, atol=0.02, rtol=0)


def test_a_transformers_default_follows_the_configs_image_size():
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    source = ModelSource("transformers:deit", {**tiny, "image_size": 64}, "random")
    read = preprocessing_of(architecture(source), source)
    assert (read.input_size, read.crop_pct, read.crop_mode) == ((3, 64, 64), 224 / 256, "squash")


def test_a_checkpoints_own_processor_is_read(tmp_path):
    from transformers import ViTConfig, ViTImageProcessor

    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTConfig(**tiny).save_pretrained(tmp_path)
    source = ModelSource(f"transformers:{tmp_path}", weights="random")
    model = architecture(source)
    settings = {"size": {"height": 96, "width": 128}, "resample": 3, "image_std": [0.1, 0.2, 0.3]}
    ViTImageProcessor(**settings).save_pretrained(tmp_path)
    read = preprocessing_of(model, source)
    assert read == Preprocessing((3, 96, 128), "bicubic", 1, (0.5, 0.5, 0.5), (0.1, 0.2, 0.3), "squash")


def test_a_processor_that_cannot_be_said_in_these_words_is_refused(tmp_path):
    from transformers import ViTConfig, ViTImageProcessor

    from vitquant.errors import ModelError

    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTConfig(**tiny).save_pretrained(tmp_path)
    ViTImageProcessor(rescale_factor=1 / 127.5).save_pretrained(tmp_path)
    source = ModelSource(f"transformers:{tmp_path}", weights="random")
    with pytest.raises(ModelError, match=r"1/255.*--preprocessing"):
        preprocessing_of(architecture(source), source)


@pytest.mark.parametrize("name", ["swin_t", "vit_b_16", "maxvit_t"])
def test_torchvisions_is_the_weights_transform(name, photograph):
    import torchvision

    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    ours = preprocessing_of(torch.nn.Identity(), ModelSource(f"torchvision:{name}")).transform()
    torch.testing.assert_close(ours(photograph), preset(photograph), atol=1e-5, rtol=0)


def test_timms_is_the_models_data_configuration_in_the_size_asked_for():
    source = ModelSource("timm:deit_tiny_patch16_224", {"depth": 1, "img_size": 96}, "random")
    assert preprocessing_of(architecture(source), source) == Preprocessing((3, 96, 96), crop_pct=0.9)


def test_a_users_module_gets_the_imagenet_default():
    source = ModelSource("python:torch.nn:Identity")
    assert preprocessing_of(torch.nn.Identity(), source) == Preprocessing((3, 224, 224), "bicubic", 0.875)


@given(
    st.sampled_from(CROP_MODES),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.floats(0.3, 1.0),
    st.sampled_from(INTERPOLATIONS),
)
@settings(max_examples=60, deadline=None)
def test_a_framed_image_is_given_back_as_its_pixels(mode, size, crop_pct, interpolation):
    steps = Preprocessing(
        input_size=(3, *size),
        crop_pct=crop_pct,
        crop_mode=mode,
        interpolation=interpolation,
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(size[0]))
    image = steps.framed(pixels)
    assert image.size == tuple(math.floor(side / crop_pct) for side in reversed(size))
    torch.testing.assert_close(steps.transform()(image), pixels / 255, rtol=0, atol=0)

"""Images of a directory for a model, in Python as on the command line."""

from __future__ import annotations

import pytest
import timm
import torch
from PIL import Image

import vitquant
from vitquant.errors import DataError, ModelError
from vitquant.image_folders import CalibrationImages, comparison_images, evaluation_images, preprocessing_for
from vitquant.recipe import requested
from vitquant.tasks.images import batches
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.workflows import task_for

STEPS = Preprocessing((3, 32, 32), crop_pct=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve photographs, two in each of six folders that are named by a class."""
    path = tmp_path_factory.mktemp("images")
    random = torch.Generator().manual_seed(0)
    for number in range(12):
        (path / str(number % 6)).mkdir(exist_ok=True)
        pixels = torch.randint(0, 256, (40, 36, 3), dtype=torch.uint8, generator=random)
        Image.fromarray(pixels.numpy()).save(path / str(number % 6) / f"{number}.png")
    return path


@pytest.fixture(scope="module")
def made(folder):
    """A float model and what was quantized of it on the folder's images."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 6}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    recipe, _ = requested("minmax", None)
    images = CalibrationImages.chosen(folder, recipe, images=8, batch=4).batches(STEPS)
    quantized = vitquant.quantize(model, recipe, images, preprocessing=STEPS.to_dict())
    quantized.provenance["calibration"]["directory"] = str(folder)
    return model, quantized


def test_as_many_as_asked_for_are_chosen_by_the_seed_and_else_as_the_recipe_says(folder):
    recipe, _ = requested("minmax", None)
    whole = CalibrationImages.chosen(folder, recipe)
    assert (len(whole.items), whole.batch) == (12, 12)  # the recipe asks for more
    first, again, other = (CalibrationImages.chosen(folder, recipe, images=5, batch=2, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first.items != other.items
    assert [len(tensor) for tensor, _ in first.batches(STEPS)] == [2, 2, 1]
    with pytest.raises(DataError, match="13 images asked for, 12 there; give --images 12 or less"):
        CalibrationImages.chosen(folder, recipe, images=13)
    with pytest.raises(DataError, match="3 calibration images are less than a batch of 4; give more, or --batch 3"):
        CalibrationImages.chosen(folder, recipe, images=3, batch=4)


def test_evaluation_has_labels_where_the_task_has_them(folder, made):
    model, quantized = made
    items = evaluation_images(folder, quantized, task_for(quantized), model)
    assert sorted({item.label for item in items}) == list(range(6))
    data = batches(items, preprocessing_for(quantized), 5)
    assert vitquant.evaluate(quantized, data, float_model=model).images == 12
    with pytest.raises(DataError, match=r"names\.csv: the task features has no classes; leave --classes out"):
        evaluation_images(folder, quantized, task_for(quantized, "features"), classes="names.csv")
    features = evaluation_images(folder, quantized, task_for(quantized, "features"))
    assert {item.label for item in features} == {None}
    result = vitquant.evaluate(quantized, batches(features, STEPS, 5), float_model=model, task="features")
    assert result.images == 12


def test_a_model_that_gives_no_logits_has_no_labels(folder, made):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
    maps = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), **sizes).eval()
    quantized = vitquant.quantize(maps, "minmax", [torch.randn(2, 3, 32, 32)])
    with pytest.raises(ModelError, match=r"no logits.*its outputs are 0 \[48, 4, 4\], 1 \[48, 4, 4\] for an image"):
        evaluation_images(folder, quantized, task_for(quantized, "classification"), maps)


def test_forms_are_compared_on_what_the_model_was_calibrated_on(folder, made):
    _, quantized = made
    found = comparison_images(quantized, images=9)
    assert [tuple(tensor.shape) for tensor in found] == [(8, 3, 32, 32), (1, 3, 32, 32)]
    assert torch.equal(torch.cat(found), torch.cat(comparison_images(quantized, folder, images=9)))
    torch.manual_seed(0)
    elsewhere = vitquant.quantize(made[0], "minmax", [torch.randn(2, 3, 32, 32)], preprocessing=STEPS.to_dict())
    with pytest.raises(DataError, match="the images that the model was calibrated on are not there; give --data DIR"):
        comparison_images(elsewhere)


def test_preprocessing_of_another_size_is_refused(made, tmp_path):
    _, quantized = made
    assert preprocessing_for(quantized) == STEPS
    (tmp_path / "steps.toml").write_text("crop_pct = 0.5\n")
    assert preprocessing_for(quantized, tmp_path / "steps.toml").crop_pct == 0.5
    (tmp_path / "steps.toml").write_text("input_size = [3, 64, 64]\n")
    with pytest.raises(DataError, match=r"input_size is \[3, 64, 64\], the model takes \[3, 32, 32\]; set it so"):
        preprocessing_for(quantized, tmp_path / "steps.toml")

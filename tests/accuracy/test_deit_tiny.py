"""The real DeiT-Tiny on real photographs: guards accuracy. Skipped where ../shared is absent."""

import pytest
import torch

import vitquant
from vitquant.model.simulation import ExactSimulation
from vitquant.runtime.on_images import interpreted
from vitquant.tasks.classification import evaluate
from vitquant.tasks.images import batches, load_listing, subset
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.zoo import ModelSource, create, pinned


@pytest.fixture(scope="module")
def deit(shared):
    weights = shared / "weights" / "deit_tiny_patch16_224.safetensors"
    return create(pinned(ModelSource("timm:deit_tiny_patch16_224", weights=str(weights))))


def photographs(shared, name, count):
    return batches(subset(load_listing(shared / "images" / name), count, 0), Preprocessing(), 25)


@pytest.mark.parametrize(
    ("recipe", "bits", "images", "agreement", "top1_loss"),
    [
        ("fq-vit", "w8a8s4", 50, 87, 6),
        pytest.param("minmax", "w8a8", 100, 87, 6, marks=pytest.mark.slow),
        pytest.param("omse", "w8a8", 100, 87, 6, marks=pytest.mark.slow),
    ],
)
def test_8_bits_stay_close_to_float(deit, shared, recipe, bits, images, agreement, top1_loss):
    quantized = vitquant.quantize(deit, recipe, photographs(shared, "photos_calibration", images), bits=bits)
    result = evaluate(quantized, deit, photographs(shared, "photos_eval", images))
    assert result.float_top1 > 80
    assert result.agreement >= agreement
    assert result.top1 >= result.float_top1 - top1_loss


def test_the_integer_program_is_the_simulation(deit, shared):
    quantized = vitquant.quantize(deit, "fq-vit", photographs(shared, "photos_calibration", 100))
    integers, exact = interpreted(vitquant.lower(quantized)), ExactSimulation(quantized)
    same_logits, same_class = [], []
    with torch.inference_mode():
        for images, _ in photographs(shared, "photos_eval", 50):
            found, expected = integers(images), exact(images).float()
            same_logits.append((found == expected).all(1))
            same_class.append(found.argmax(1) == expected.argmax(1))
    assert torch.cat(same_class).double().mean() >= 0.98
    assert torch.cat(same_logits).double().mean() >= 0.94  # 99.6 % of all 500: docs/integers.md


def test_gains_of_zero_are_there_and_harmless(deit, shared):
    gains = [p for name, p in deit.named_parameters() if "norm" in name and name.endswith("weight")]
    assert sum(int((gain == 0).sum()) for gain in gains) == 2
    quantized = vitquant.quantize(deit, "minmax", photographs(shared, "photos_calibration", 25))
    with torch.no_grad():
        for images, _ in photographs(shared, "photos_eval", 25):
            assert torch.isfinite(quantized(images)).all()

"""The real DeiT-Tiny on real photographs: guards accuracy. Skipped where ../shared is absent."""

import pytest
import torch

import vitquant
from vitquant.lowering import lower
from vitquant.runtime.interpreter import Interpreter
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
    ("recipe", "bits", "agreement", "top1_loss"),
    [("minmax", "w8a8", 87, 6), ("omse", "w8a8", 87, 6), ("fq-vit", "w8a8s4", 87, 6)],
)
def test_8_bits_stay_close_to_float(deit, shared, recipe, bits, agreement, top1_loss):
    quantized = vitquant.quantize(deit, recipe, photographs(shared, "photos_calibration", 100), bits=bits)
    result = evaluate(quantized, deit, photographs(shared, "photos_eval", 100))
    assert result.float_top1 > 80
    assert result.agreement >= agreement
    assert result.top1 >= result.float_top1 - top1_loss


def test_the_integer_program_agrees_with_the_simulation(deit, shared):
    quantized = vitquant.quantize(deit, "fq-vit", photographs(shared, "photos_calibration", 100))
    program = Interpreter(lower(quantized))
    same = []
    with torch.no_grad():
        for images, _ in photographs(shared, "photos_eval", 50):
            codes = program(quantized.quantizers["patch_embed:input"].encode(images))
            same.append(codes.argmax(1) == quantized(images).argmax(1))
    assert torch.cat(same).double().mean() >= 0.94


def test_gains_of_zero_are_there_and_harmless(deit, shared):
    gains = [p for name, p in deit.named_parameters() if "norm" in name and name.endswith("weight")]
    assert sum(int((gain == 0).sum()) for gain in gains) == 2
    quantized = vitquant.quantize(deit, "minmax", photographs(shared, "photos_calibration", 25))
    with torch.no_grad():
        for images, _ in photographs(shared, "photos_eval", 25):
            assert torch.isfinite(quantized(images)).all()

"""FQ-ViT from a float model to a quantized one, on tiny models of every library with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import vitquant
from vitquant.errors import CalibrationError, RecipeError
from vitquant.model import QuantizedModel
from vitquant.report.operations import Operation, list_operations
from vitquant.spec import Log2, PerTensor, PowerOfTwoFactor, Uniform

SIZES = {"embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}
TRANSFORMERS = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 48, "image_size": 32, "patch_size": 8}


def timm_vit() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", depth=1, **SIZES)


def timm_deit_with_two_heads() -> nn.Module:
    import timm

    return timm.create_model("deit_tiny_distilled_patch16_224", depth=1, **SIZES)


def timm_swin() -> nn.Module:
    import timm

    sizes = {"depths": (2, 1), "embed_dim": 16, "num_heads": (2, 4), "img_size": 32, "window_size": 4}
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes, num_classes=5)


def transformers_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**TRANSFORMERS, num_hidden_layers=1, num_labels=5))


def transformers_deit() -> nn.Module:
    from transformers import DeiTConfig, DeiTForImageClassification

    return DeiTForImageClassification(DeiTConfig(**TRANSFORMERS, num_hidden_layers=1, num_labels=5))


def transformers_swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4, "image_size": 32}
    return SwinForImageClassification(SwinConfig(**sizes, num_labels=5))


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 1, 3, 24, 48, num_classes=5)


def torchvision_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 16, [2, 1], [2, 4], [4, 4], num_classes=5)


MODELS = [
    timm_vit,
    timm_deit_with_two_heads,
    timm_swin,
    transformers_vit,
    transformers_deit,
    transformers_swin,
    torchvision_vit,
    torchvision_swin,
]


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """The model with random weights: where libraries begin with zeros, too."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def photos(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def logits(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits  # type: ignore[attr-defined]


def distance(quantized: QuantizedModel, model: nn.Module) -> float:
    x = photos(8, seed=1)
    with torch.no_grad():
        found, expected = logits(quantized(x)), logits(model(x))
    assert torch.isfinite(found).all()
    return ((found - expected).norm() / expected.norm()).item()


def in_float(quantized: QuantizedModel) -> list[Operation]:
    return [operation for operation in list_operations(quantized) if operation.arithmetic == "float"]


@pytest.mark.parametrize("make", MODELS)
def test_no_operation_of_any_library_s_model_is_in_float(make: Callable[[], nn.Module]) -> None:
    model = made(make)
    quantized = vitquant.quantize(model, "fq-vit", photos(6).split(3))
    assert in_float(quantized) == []
    kinds = {site.name: site.kind for site in quantized.sites}
    on_codes = {kinds[name] for name in quantized.integer_operations}
    assert on_codes == {"softmax", "layer_norm", "activation"}
    assert distance(quantized, model) < 0.3


def test_probabilities_and_norm_inputs_have_the_schemes_of_the_paper() -> None:
    quantized = vitquant.quantize(made(timm_vit), "fq-vit", [photos()])
    for site in quantized.sites:
        for operand in site.operands:
            value = next(value for value in quantized.values if site.reader(operand) in value.readers)
            spec = quantized.quantizers[value.name].spec
            if operand == "probs":
                assert (spec.scheme, spec.bits) == (Log2(), 4)
            elif any(reader.kind == "layer_norm" for reader in value.readers):
                assert (spec.scheme, spec.bits) == (PowerOfTwoFactor(4), 8)
            else:
                assert (spec.scheme, spec.bits) == (Uniform(), 8)


def test_as_published_nothing_but_gelu_is_in_float_and_probabilities_have_17_levels() -> None:
    model = made(timm_vit)
    quantized = vitquant.quantize(model, "fq-vit-published", [photos()])
    assert [operation.name for operation in in_float(quantized)] == ["blocks.0.mlp.act"]
    assert quantized.quantizers["blocks.0.attn.context:probs"].spec.scheme == Log2(separate_zero=True)
    assert distance(quantized, model) < 0.3


OBSERVERS = ["minmax", "moving-average", "percentile", "omse"]
RECIPES = ["fq-vit", "fq-vit+uniform-norm-inputs+uniform-probs"]


@cache
def configured(recipe: str, observer: str) -> QuantizedModel:
    bits = "w8a8s8" if "uniform-probs" in recipe else None
    settings = [f"activations.observer={observer}"]
    return vitquant.quantize(made(timm_vit), recipe, photos(6).split(3), bits=bits, settings=settings)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_eight_configurations_of_the_paper(recipe: str, observer: str) -> None:
    quantized = configured(recipe, observer)
    schemes = {type(quantizer.spec.scheme) for quantizer in quantized.quantizers.values()}
    assert schemes == ({Uniform} if "+" in recipe else {Uniform, PowerOfTwoFactor, Log2})
    assert quantized.assignments["blocks.0.mlp.fc1:input"].observer == observer
    assert quantized.assignments["blocks.0.attn.context:probs"].observer == ("minmax" if "+" in recipe else "unit")
    assert in_float(quantized) == []
    assert distance(quantized, made(timm_vit)) < 0.3


def test_observers_and_overlays_make_different_models() -> None:
    """But for percentiles: of a few values they are the extremes, as a moving average has them."""
    x, observers = photos(2, seed=1), ("minmax", "moving-average", "omse")
    outputs = [configured(recipe, observer)(x) for recipe in RECIPES for observer in observers]
    assert all(not torch.equal(left, right) for i, left in enumerate(outputs) for right in outputs[:i])


@pytest.mark.parametrize("overlay", ["uniform-norm-inputs", "uniform-probs"])
def test_an_overlay_alone_changes_its_operands_alone(overlay: str) -> None:
    whole, without = configured("fq-vit", "minmax"), configured(f"fq-vit+{overlay}", "minmax")
    changed = {
        name.rpartition(":")[2] if "norm" not in name else "norm"
        for name, quantizer in whole.quantizers.items()
        if quantizer.spec.scheme != without.quantizers[name].spec.scheme
    }
    assert changed == {"norm" if overlay == "uniform-norm-inputs" else "probs"}
    assert in_float(without) == []


class OtherNorms(nn.Module):
    """BatchNorm behind the patches, RMSNorm before attention, LayerNorm before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.batch_norm = nn.BatchNorm2d(16)
        self.rms_norm = nn.RMSNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch_norm(self.patches(x)).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(self.rms_norm(x)).chunk(3, -1)
        x = x + (query @ key.transpose(-2, -1) * 0.25).softmax(-1) @ value
        return self.head(self.norm(x).mean(1))


@pytest.mark.parametrize("recipe", ["fq-vit", "fq-vit-published"])
def test_norms_that_are_no_layer_norm_are_quantized_as_what_they_are(recipe: str) -> None:
    model = made(OtherNorms)
    quantized = vitquant.quantize(model, recipe, [photos(8)], bits="w8a8s4r7", simulated=True)
    sites = {site.kind: site for site in quantized.sites}
    for kind in ("batch_norm", "rms_norm"):
        reader = sites[kind].reader("input")
        value = next(value for value in quantized.values if reader in value.readers)
        spec = quantized.quantizers[value.name].spec
        assert (spec.scheme, spec.granularity, spec.bits) == (Uniform(), PerTensor(), 7)
    # Batch norm is a factor and a constant for each channel, which a rescaling takes along.
    assert in_float(quantized) == []
    assert distance(quantized, model) < 0.3


def test_one_bit_probabilities_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"'w8a8s1': 1 bits: .* from 2 to 16"):
        vitquant.quantize(made(timm_vit), "fq-vit", [photos()], bits="w8a8s1")


def test_more_bits_than_the_tables_hold_leave_softmax_in_float_and_say_so() -> None:
    quantized = vitquant.quantize(made(timm_vit), "fq-vit", [photos()], bits="w8a8s8", simulated=True)
    assert set(quantized.float_reasons) == {"blocks.0.attn.softmax"}
    assert all("its result has 8 bits" in reason for reason in quantized.float_reasons.values())


@pytest.mark.parametrize("recipe", ["fq-vit", "fq-vit-published"])
def test_images_that_can_be_read_once_only_are_refused(recipe: str) -> None:
    with pytest.raises(CalibrationError, match=r"more than once.*give a list of batches or a DataLoader"):
        vitquant.quantize(made(timm_vit), recipe, (batch for batch in photos().split(2)))


def test_the_same_images_give_the_same_model() -> None:
    x, outputs, states = photos(2, seed=1), [], []
    for _ in range(2):
        quantized = vitquant.quantize(made(timm_vit), "fq-vit", photos(6).split(3))
        outputs.append(quantized(x))
        states.append(quantized.graph_module.state_dict())
    assert torch.equal(*outputs)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_saved_factors_are_those_that_are_loaded(tmp_path: Path) -> None:
    """Of inputs, and of weights, whose codes mean nothing without them."""
    model, x = made(timm_vit), photos(2, seed=1)
    with torch.no_grad():
        for layer in (each for each in model.modules() if isinstance(each, nn.Linear)):
            layer.weight *= 2.0 ** torch.arange(len(layer.weight)).remainder(4)[:, None]  # a factor for each row
    spec = ["scheme=power_of_two_factor", "signed=false", "symmetric=false", "factors=4"]
    quantized = vitquant.quantize(model, "fq-vit", [photos()], settings=[f"weights.{each}" for each in spec])
    expected = {name: each.factor for name, each in quantized.quantizers.items() if each.factor is not None}
    assert any(name.endswith(":weight") for name in expected)
    assert any(name.endswith(":input") for name in expected)
    for number, factor in enumerate(expected.values()):  # others than what calibration would choose again
        if number % 2:
            factor.copy_(factor.flip(0))
    quantized.save(tmp_path / "out")
    loaded = vitquant.load(tmp_path / "out", timm_vit())
    for name, factor in expected.items():
        found = loaded.quantizers[name].factor
        assert found is not None
        assert torch.equal(found, factor)
    assert any(int(factor.max()) > int(factor.min()) for factor in expected.values())
    assert torch.equal(loaded(x), quantized(x))

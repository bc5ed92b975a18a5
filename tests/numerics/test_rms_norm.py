"""RMSNorm in integers: against exact fractions, torch's float64, and in whole models on every runtime."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import timm
import torch
from architectures import vary
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import RmsNorm as TimmRmsNorm
from torch import nn

import vitquant
from vitquant.graph.capture import capture
from vitquant.integer.arithmetic import rescaling
from vitquant.integer.layer_norm import guard_bits, integer_epsilon
from vitquant.integer.rms_norm import RmsNorm, normalize
from vitquant.model.simulation import ExactSimulation
from vitquant.runtime.on_images import interpreted

SHAPES = st.sampled_from([(1, 9), (2, 1), (3, 2**15), (48, 2040), (768, 255), (3072, 2040)])


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, epsilon=st.sampled_from([1, 1000, 2**40]), seed=st.integers(0, 2**31))
def test_normalized_values_are_those_of_exact_roots(shape: tuple[int, int], epsilon: int, seed: int) -> None:
    count, largest = shape
    random = torch.Generator().manual_seed(seed)
    x = torch.zeros(5, count, dtype=torch.int64)
    x[0] = torch.randint(-largest, largest + 1, (count,), generator=random)
    x[1] = (torch.randn(count, generator=random) * 3).round().long().clamp(-largest, largest)
    x[2] = largest
    x[3, 0] = -largest
    found, guard = normalize(x, epsilon, largest), guard_bits(count, largest, epsilon)
    for row, values in zip(found.tolist(), x.tolist(), strict=True):
        root = count * sum(value * value for value in values) + epsilon
        relative = 2.0**-guard / math.sqrt(root) + math.sqrt(root) * 2.0**-50  # of the root and of the reciprocal
        for n, value in zip(row, values, strict=True):
            exact = count * value * 2**16 / math.sqrt(root)
            assert abs(n - exact) <= 0.5 + abs(exact) * relative + 1e-6


def test_codes_on_real_numbers_are_torch_s() -> None:
    random = torch.Generator().manual_seed(0)
    x, scale, count = torch.randint(-300, 300, (64, 48), generator=random), 0.004, 48
    gain = torch.rand(count, generator=random, dtype=torch.float64)
    for epsilon in (1e-6, 1e-2, 1.0):
        expected = nn.functional.rms_norm(x.double() * scale, (count,), gain, epsilon)
        affine = rescaling(gain / 0.01 / 2**16, torch.zeros(count, dtype=torch.float64))
        found = RmsNorm(integer_epsilon(epsilon, scale, count), 300, affine, -1000, 1000).apply(x)
        assert (found - expected / 0.01).abs().max() < 0.52


class Written(nn.Module):
    """As transformers' models write it."""

    def __init__(self, width: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps)).to(x.dtype)


def vit(norm: Callable[[int], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10,
        norm_layer=norm,
    ).eval()  # fmt: skip
    vary(model)
    return model


NORMS: dict[str, Callable[[int], nn.Module]] = {"timm": TimmRmsNorm, "torch": nn.RMSNorm, "written": Written}
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", NORMS)
def test_every_library_s_is_one_kind_with_layer_norm_s_names(norm: str) -> None:
    quantized = vitquant.quantize(vit(NORMS[norm]), "minmax", [IMAGES])
    names = [site.name for site in quantized.sites if site.kind == "rms_norm"]
    assert names == ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"]
    assert not any(site.kind in ("gate", "pool") for site in quantized.sites)


@pytest.mark.parametrize(("norm", "recipe"), [("timm", "fq-vit"), ("torch", "default"), ("written", "fq-vit")])
def test_models_with_it_run_in_integers(norm: str, recipe: str, tmp_path) -> None:
    model = vit(NORMS[norm])
    quantized = vitquant.quantize(model, recipe, [IMAGES])
    assert not quantized.float_reasons
    program = vitquant.lower(quantized)
    expected = interpreted(program)(IMAGES)
    assert torch.equal(expected, ExactSimulation(quantized)(IMAGES).float())
    quantized.save(tmp_path / "out")
    assert torch.equal(interpreted(vitquant.lower(vitquant.load(tmp_path / "out", model)))(IMAGES), expected)
    pytest.importorskip("onnxruntime")
    from vitquant.engines import WAYS
    from vitquant.exports.formats import write

    write(quantized, "onnx-integer", tmp_path / "integer.onnx")
    assert torch.equal(WAYS["onnx-integer"][0].open(tmp_path / "integer.onnx", 1).on_images(IMAGES), expected)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),  # of another axis
        lambda x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6),
        lambda x: x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6),
        lambda x: (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    ],
)
def test_what_only_looks_like_it_is_left(other: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return other(x)

    images = torch.randn(2, 3, 8, 8)
    captured = capture(Net(), images)
    assert "rms_norm" not in str(captured.graph)
    torch.testing.assert_close(captured(images), other(images))

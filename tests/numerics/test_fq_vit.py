"""FQ-ViT's power-of-two factors against its equations (methods.md 3.3), computed by loops in float64."""

from __future__ import annotations

from functools import cache

import pytest
import timm
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vitquant
from vitquant.errors import RecipeError
from vitquant.methods.power_of_two_factor import ChooseFactorsSettings, factor_errors
from vitquant.model import QuantizedModel

NORMS = {
    "blocks.0.norm1:input": "blocks.0.norm1",
    "blocks.0.norm2:input": "blocks.0.norm2",
    "norm:input": "norm",
}


def vit() -> nn.Module:
    """A ViT whose residual stream has channels of very different ranges, one of zeros and one of a single value."""
    torch.manual_seed(0)
    sizes = {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    with torch.no_grad():
        model.pos_embed.normal_()
        model.cls_token.normal_()
        for projection in (model.patch_embed.proj, model.blocks[0].attn.proj, model.blocks[0].mlp.fc2):
            projection.weight *= 2.0 ** torch.arange(24).remainder(6).view(-1, *[1] * (projection.weight.ndim - 1))
            projection.weight[:2] = 0
            projection.bias[:2] = 0
        for tokens in (model.pos_embed, model.cls_token):
            tokens[..., 0] = 0
        model.pos_embed[..., 1] = 1.5
        model.cls_token[..., 1] = 0
    return model


@cache
def quantized(recipe: str, *settings: str) -> QuantizedModel:
    return vitquant.quantize(vit(), recipe, batches(), settings=settings)


def swin() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"depths": (1, 1), "embed_dim": 16, "num_heads": (2, 4), "img_size": 32, "window_size": 4}
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes, num_classes=5).eval()


def batches() -> list[Tensor]:
    """Three of different spread, so that the last one alone says something else than all."""
    random = torch.Generator().manual_seed(1)
    return [
        torch.randn(count, 3, 32, 32, generator=random) * spread for count, spread in ((4, 3.0), (3, 1.0), (2, 0.6))
    ]


def inputs_of(model: nn.Module, modules: dict[str, str], data: list[Tensor]) -> dict[str, list[Tensor]]:
    """What each LayerNorm of the unmodified model reads: for each batch (rows, channels), float64."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].flatten(0, -2).double())
        )
        for name, path in modules.items()
    ]
    with torch.no_grad():
        for batch in data:
            model(batch)
    for hook in hooks:
        hook.remove()
    return seen


def squared_errors(x: Tensor, scale: float, zero_point: int) -> list[list[float]]:
    """For each channel the squared error with each of the steps s, 2s, 4s, 8s, by the equations."""
    errors = []
    for channel in x.T:
        errors.append([])
        for k in range(4):
            step = scale * 2**k
            codes = (torch.round(channel / step) + zero_point).clamp(0, 255)
            errors[-1].append(float((channel - step * (codes - zero_point)).square().sum()))
    return errors


def factors(model: QuantizedModel, name: str) -> Tensor:
    factor = model.quantizers[name].factor
    assert factor is not None
    return factor


def assert_factors(model: QuantizedModel, name: str, x: Tensor, scored: Tensor) -> None:
    """Scale and zero point from all of `x`, the factors by the error on `scored`."""
    quantizer = model.quantizers[name]
    assert quantizer.zero_point is not None
    coarsest = (x.max() - x.min()).item() / 255
    assert quantizer.scale.item() == pytest.approx(coarsest / 8, rel=1e-5)
    assert quantizer.zero_point.item() == round(-x.min().item() / coarsest)
    assert len(factors(model, name)) == x.shape[-1]
    by_hand = squared_errors(scored, quantizer.scale.item(), quantizer.zero_point.item())
    for factor, errors in zip(factors(model, name).tolist(), by_hand, strict=True):
        assert errors[factor] <= min(errors) * (1 + 1e-4) + 1e-9
        if errors.count(0.0) > 1:
            assert factor == errors.index(0.0)


ALL, LAST = "choose-factors.batches=all", "choose-factors.batches=last"


@pytest.mark.parametrize("chosen_on", [ALL, LAST])
def test_scale_zero_point_and_factors_are_those_of_the_equations(chosen_on: str) -> None:
    model = quantized("fq-vit", chosen_on)
    used = set()
    for name, seen in inputs_of(vit(), NORMS, batches()).items():
        assert_factors(model, name, torch.cat(seen), torch.cat(seen) if chosen_on == ALL else seen[-1])
        used.update(factors(model, name).tolist())
    assert len(used) > 1  # the model is no trivial case


def test_all_batches_and_the_last_one_choose_differently() -> None:
    every, last = quantized("fq-vit", ALL), quantized("fq-vit", LAST)
    assert any(not torch.equal(factors(every, name), factors(last, name)) for name in NORMS)
    assert all(torch.equal(every.quantizers[name].scale, last.quantizers[name].scale) for name in NORMS)


def test_fq_vit_chooses_on_all_batches_and_as_published_on_the_last() -> None:
    for recipe, which in (("fq-vit", ALL), ("fq-vit-published", LAST)):
        for name in NORMS:
            assert torch.equal(factors(quantized(recipe), name), factors(quantized("fq-vit", which), name))


def test_of_equal_factors_the_finest_is_chosen() -> None:
    assert factors(quantized("fq-vit", ALL), "blocks.0.norm1:input")[0] == 0  # a channel of zeros


def test_patch_merging_has_a_factor_for_each_of_its_four_times_as_many_channels() -> None:
    model = swin()
    found = vitquant.quantize(model, "fq-vit", batches())
    name = next(name for name, q in found.quantizers.items() if q.factor is not None and len(q.factor) == 4 * 16)
    seen = torch.cat(inputs_of(model, {name: "layers.1.downsample.norm"}, batches())[name])
    assert_factors(found, name, seen, seen)


def test_shifted_codes_are_integers_on_the_finest_scale() -> None:
    for name in NORMS:
        quantizer = quantized("fq-vit", ALL).quantizers[name]
        assert quantizer.factor is not None
        assert quantizer.zero_point is not None
        codes = torch.arange(256)[:, None].expand(-1, 24)
        shifted = (codes - quantizer.zero_point) << quantizer.factor
        assert torch.equal(quantizer.decode(codes), shifted * quantizer.scale)
        # As published: X = round(x / s_c) * round(s_c / s_1), s_c the step of the channel.
        values = quantizer.decode(codes).double()
        published = (values / quantizer.step).round() * (quantizer.step / quantizer.scale).round()
        assert torch.equal(published.long(), shifted)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3000), st.integers(0, 255), st.floats(1e-3, 2.0))
@example(456354983, 1, 0, 0.9999)  # an error that is small beside the number
def test_factor_errors_are_those_of_float64(seed: int, count: int, zero_point: int, scale: float) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=random) * 2.0 ** torch.arange(5) * 20
    scale = torch.tensor(scale).item()  # as float32 holds it
    found = factor_errors(x, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), 4, 255)
    assert found.dtype == torch.float64
    expected = torch.tensor(squared_errors(x.double(), scale, zero_point), dtype=torch.float64).T
    # Float32 rounds a level's value, and x / step to the other side of a half now and then, by less than this of x.
    rounding = (x.double() * 2.0**-22).square().sum(0)
    assert bool(((found - expected).abs() <= 2 * (expected * rounding).sqrt() + rounding).all())


def test_the_record_counts_channels_and_compares_with_one_step_for_all() -> None:
    model = quantized("fq-vit", ALL)
    record = next(record for record in model.records if record.method == "choose-factors")
    assert record.summary == {"operands": 3, "batches": 3}
    for name, seen in inputs_of(vit(), NORMS, batches()).items():
        decision, quantizer = record.decisions[name], model.quantizers[name]
        assert quantizer.zero_point is not None
        assert decision["channels per factor"] == [int((factors(model, name) == k).sum()) for k in range(4)]
        by_hand = squared_errors(torch.cat(seen), quantizer.scale.item(), quantizer.zero_point.item())
        ratio = sum(map(min, by_hand)) / sum(errors[-1] for errors in by_hand)
        assert decision["squared error / one step for all"] == pytest.approx(ratio, rel=1e-3)


def test_nothing_is_chosen_and_no_data_are_read_where_no_operand_has_factors() -> None:
    model = vitquant.quantize(vit(), "fq-vit+uniform-norm-inputs", iter(batches()))  # read once only
    record = next(record for record in model.records if record.method == "choose-factors")
    assert record.summary == {"operands": 0}


def test_other_batches_are_refused() -> None:
    with pytest.raises(RecipeError, match="'first': it is all or last"):
        ChooseFactorsSettings("first")

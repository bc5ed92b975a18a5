"""Attention that torch, or somebody else, would compute by one operator: looked into, or refused by its name."""

import itertools
import threading

import pytest
import torch
from architectures import CLASSES, Patches
from torch import nn
from torch.nn import functional

import vitquant
from vitquant.errors import CaptureError
from vitquant.graph.attention import find_attention
from vitquant.graph.capture import capture

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = 16
MASKS = ("none", "additive", "boolean", "causal", "padding", "padding of images")


def mask_arguments(mask, tokens, name):
    """What is given to an encoder or decoder, made in its caller's forward."""
    above = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    match mask:
        case "additive":
            return {name("mask"): torch.zeros(TOKENS, TOKENS).masked_fill(above, float("-inf"))}
        case "boolean":
            return {name("mask"): above}
        case "causal":
            square = nn.Transformer.generate_square_subsequent_mask(TOKENS)
            return {name("mask"): square, name("is_causal"): True}
        case "padding":
            masked = torch.zeros(len(tokens), TOKENS, dtype=torch.bool)
            masked[:, -2:] = True
            return {name("key_padding_mask"): masked}
        case "padding of images":
            return {name("key_padding_mask"): tokens.abs().amax(-1) > 2.5}
    return {}


class Encoder(nn.Module):
    """`nn.TransformerEncoder`; its head reads the first token, which no padding masks."""

    def __init__(self, mask="none", nested=True, first_only=True, strict=False, **layer):
        super().__init__()
        self.mask, self.first_only, self.strict = mask, first_only, strict
        self.batch_first = layer.get("batch_first", False)
        self.patches, self.head = Patches(), nn.Linear(32, CLASSES)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, **layer), 1, None, nested)

    def forward(self, images):
        tokens = self.patches(images)
        names = {"mask": "mask", "key_padding_mask": "src_key_padding_mask", "is_causal": "is_causal"}
        given = mask_arguments(self.mask, tokens, names.__getitem__)
        tokens = self.encoder(tokens if self.batch_first else tokens.transpose(0, 1), **given)
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        logits = self.head(tokens[:, 0] if self.first_only else tokens.mean(1))
        return logits.reshape(len(images), CLASSES) if self.strict else logits


def assert_captured(model, attentions=1):
    """Captured with its attention, and the same function as the model is outside of capture."""
    torch.manual_seed(0)
    captured = capture(model.eval(), IMAGES)
    assert len(find_attention(captured.graph).scores) == attentions
    with torch.no_grad():
        assert torch.allclose(captured(IMAGES[:1]), model(IMAGES[:1]), atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()
    assert not any(module._forward_pre_hooks for module in model.modules())


FORMS = list(itertools.product((False, True), ("relu", "gelu", functional.silu), (False, True)))
FUSED = (False, "relu", True)  # post-norm with batch_first is what torch fuses
BRIEFLY = [(*FUSED, mask) for mask in MASKS] + [(*form, "boolean") for form in FORMS if form != FUSED]
OTHERS = [(*form, mask) for form in FORMS for mask in MASKS if (*form, mask) not in BRIEFLY]


@pytest.mark.parametrize(
    ("norm_first", "activation", "batch_first", "mask"),
    [*BRIEFLY, *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS)],
)
def test_encoders_are_captured(norm_first, activation, batch_first, mask):
    assert_captured(Encoder(mask, norm_first=norm_first, activation=activation, batch_first=batch_first))


@pytest.mark.parametrize(("activation", "nested"), [("relu", True), ("gelu", False)])
def test_encoders_are_captured_in_strict_mode_too(activation, nested):
    """`len` of a batch needs it, and there torch fuses a whole layer."""
    assert_captured(Encoder(nested=nested, strict=True, activation=activation, batch_first=True).requires_grad_(False))


def test_masked_tokens_that_torch_leaves_zero_are_refused_where_they_are_read():
    reads_all = {"first_only": False, "batch_first": True}
    with pytest.raises(CaptureError, match="enable_nested_tensor=False"):
        capture(Encoder("padding", **reads_all).eval(), IMAGES)
    assert torch.backends.mha.get_fastpath_enabled()
    assert_captured(Encoder("padding", nested=False, **reads_all))


@pytest.mark.parametrize(
    ("needs_weights", "batch_first", "strict"), [(False, True, True), (True, True, True), (False, False, False)]
)
def test_multi_head_attention_is_captured(needs_weights, batch_first, strict):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.head = Patches(), nn.Linear(32, CLASSES)
            self.attention = nn.MultiheadAttention(32, 2, batch_first=batch_first)

        def forward(self, images):
            tokens = self.patches(images) if batch_first else self.patches(images).transpose(0, 1)
            tokens = self.attention(tokens, tokens, tokens, need_weights=needs_weights)[0]
            logits = self.head(tokens.mean(1 if batch_first else 0))
            return logits.reshape(len(images), CLASSES) if strict else logits

    assert_captured(Net())


@pytest.mark.parametrize(("mask", "batch_first"), [("none", False), ("boolean", True), ("causal", True)])
def test_decoders_are_captured(mask, batch_first):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.head = Patches(), nn.Linear(32, CLASSES)
            self.both = nn.Transformer(32, 2, 1, 1, 64, batch_first=batch_first)

        def forward(self, images):
            tokens = self.patches(images) if batch_first else self.patches(images).transpose(0, 1)
            tokens = self.both(tokens, tokens, **mask_arguments(mask, tokens, lambda name: f"tgt_{name}"))
            return self.head(tokens.mean(1 if batch_first else 0))

    assert_captured(Net(), attentions=3)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_encoders_are_no_range_of_the_scores(mask):
    torch.manual_seed(0)
    model = Encoder(mask, norm_first=True, batch_first=True, nested=False).eval()
    assert_quantized(model, in_integers=mask != "padding of images")


@pytest.mark.parametrize("needs_weights", [False, True])
@pytest.mark.parametrize("name", ["key_padding_mask", "attn_mask"])
def test_masks_of_the_batch_are_no_range_of_the_scores(name, needs_weights):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.head = Patches(), nn.Linear(32, CLASSES)
            self.norm, self.attention = nn.LayerNorm(32), nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, images):
            tokens = self.norm(self.patches(images))
            shape = (len(images), TOKENS) if name == "key_padding_mask" else (2 * len(images), TOKENS, TOKENS)
            masked = torch.zeros(shape, dtype=torch.bool)
            masked[..., -4:] = True
            given = {name: masked, "need_weights": needs_weights}
            return self.head((tokens + self.attention(tokens, tokens, tokens, **given)[0]).mean(1))

    torch.manual_seed(0)
    assert_quantized(Net().eval())


def assert_quantized(model, in_integers=True):
    """Quantized in the range that its scores have without what masks some of them, which integers know as constants."""
    quantized = vitquant.quantize(model, "fq-vit", [IMAGES], simulated=True)
    ((low, high),) = [each.range() for name, each in quantized.quantizers.items() if name.endswith("softmax:input")]
    assert -20 < low <= high < 20
    with torch.no_grad():
        expected, found = model(IMAGES), quantized(IMAGES)
    assert (found - expected).norm() < 0.2 * expected.norm()
    if in_integers:
        vitquant.lower(quantized)


def test_the_switch_is_given_back_however_many_capture_at_once():
    def work():
        with pytest.raises(CaptureError):
            capture(Encoder(batch_first=True), torch.randn(2, 4, 32, 32))
        capture(Encoder(batch_first=True, strict=True), IMAGES)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        capture(Encoder(batch_first=True), IMAGES)
        assert not torch.backends.mha.get_fastpath_enabled()  # as the user has it
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# --- one operator for all of it ---------------------------------------------------------------------


@torch.library.custom_op("vitquant_tests::flash_attention", mutates_args=())
def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query, key, value).contiguous()


@torch.library.custom_op("vitquant_tests::mix", mutates_args=())
def mix(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query, key, value).contiguous()


@torch.library.custom_op("vitquant_tests::block", mutates_args=())
def block(tokens: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(tokens, tokens, tokens).contiguous()


@torch.library.custom_op("vitquant_tests::no_fake", mutates_args=())
def no_fake(tokens: torch.Tensor) -> torch.Tensor:
    return tokens + 1


@torch.library.custom_op("vitquant_tests::bent", mutates_args=())
def bent(tokens: torch.Tensor) -> torch.Tensor:
    return functional.gelu(tokens)


for operator in (flash, mix, block, bent):
    operator.register_fake(lambda first, *_: torch.empty_like(first))


# As a C++ extension registers one: without a fake implementation.
KERNELS = torch.library.Library("vitquant_tests_kernel", "DEF")
KERNELS.define("kernel(Tensor query, Tensor key, Tensor value) -> Tensor")
KERNELS.impl("kernel", lambda query, key, value: (query @ key.mT).softmax(-1) @ value, "CPU")


def causal(query, key, value):
    from torch.nn.attention.bias import causal_lower_right

    return functional.scaled_dot_product_attention(query, key, value, causal_lower_right(query.shape[2], key.shape[2]))


class Attending(nn.Module):
    def __init__(self, attend, beside=False):
        super().__init__()
        self.patches, self.qkv, self.head = Patches(), nn.Linear(32, 96), nn.Linear(32, CLASSES)
        self.attend, self.beside = attend, beside

    def forward(self, images):
        q, k, v = self.qkv(self.patches(images)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        found = self.attend(q, k, v)
        if self.beside:
            found = found + functional.scaled_dot_product_attention(q, k, v)
        return self.head(found.transpose(1, 2).flatten(2).mean(1))


def flex(query, key, value):
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value)


@pytest.mark.parametrize(
    ("attend", "said"),
    [
        (flash, "vitquant_tests.flash_attention"),
        (mix, "vitquant_tests.mix may be"),
        (lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0], "_for_cpu"),
        (lambda q, k, v: torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0], "efficient"),
        (lambda q, k, v: torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0], "attention_math"),
        (flex, "flex_attention"),
    ],
)
def test_attention_in_one_operator_is_refused_by_its_name_with_other_attention_beside_it(attend, said):
    with pytest.raises(CaptureError, match=said) as refused:
        capture(Attending(attend, beside=True).eval(), IMAGES)
    assert "scaled_dot_product_attention" in str(refused.value)
    assert 'attn_implementation="sdpa"' in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_mask_of_its_own_class_is_told_from_a_tensor():
    with pytest.raises(CaptureError, match="is_causal=True, or a tensor"):
        capture(Attending(causal).eval(), IMAGES)


def test_an_operator_of_ones_own_is_refused_only_where_attention_must_be_in_it():
    with pytest.raises(CaptureError, match=r"must be within vitquant_tests\.block"):
        capture(Attending(lambda q, k, v: block(q)).eval(), IMAGES)
    with pytest.raises(CaptureError, match=r"vitquant_tests\.no_fake cannot be captured"):
        capture(Attending(lambda q, k, v: no_fake(q)).eval(), IMAGES)
    with pytest.raises(CaptureError, match=r"vitquant_tests_kernel\.kernel cannot be captured; .*plain products"):
        capture(Attending(torch.ops.vitquant_tests_kernel.kernel).eval(), IMAGES)
    assert_captured(Attending(lambda q, k, v: bent(functional.scaled_dot_product_attention(q, k, v))))

"""Masks before a softmax: what is one, where the scores are quantized, and what masked entries become."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

import vitquant
from vitquant.errors import CalibrationError, LoweringError
from vitquant.graph.capture import capture
from vitquant.graph.masks import is_mask_on, masks_between, masks_whole_rows, unmasked
from vitquant.graph.operators import FILLS, SOFTMAX, arguments, aten, calls
from vitquant.model import QuantizedModel
from vitquant.model.simulation import ExactSimulation
from vitquant.runtime.on_images import interpreted

TOKENS, HEADS, WIDTH = 16, 2, 16

MASKED = torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)) < 0.4
MASKED[range(TOKENS), range(TOKENS)] = False


def mask_of(value: float) -> Tensor:
    return torch.zeros(TOKENS, TOKENS).masked_fill(MASKED, value)


MASKS = {
    "minus_100": 1,
    "smallest_float": 1,
    "minus_infinity": 1,
    "windows": 1,
    "fill_minus_infinity": 1,
    "fill_minus_10000": 1,
    "attention_boolean": 1,
    "attention_causal": 1,
    "behind_a_bias": 1,
    "bias_plus_mask": 1,
    "mask_plus_bias": 1,
    "mask_first": 1,
    "two_masks": 2,
    "made_for_the_batch": 1,
    "made_by_filling": 1,
    "made_of_a_buffer": 1,
    "made_boolean": 1,
    "infinite_from_the_image": 1,
    "infinite_where": 1,
    "infinite_and_causal": 2,
}
NO_MASKS = [
    "position_bias",
    "learned_mask",
    "slopes",
    "mask_and_bias_in_one",
    "zeros",
    "positive",
    "fill_minus_3",
    "from_the_image",
    "other_for_each_image",
    "other_for_late_images",
    "other_for_each_head",
    "learned_for_the_batch",
]


class Attention(nn.Module):
    """One head-split attention whose scores are masked, or something like it, in the way that `how` names."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.register_buffer("excluded", MASKED.clone())
        value = {"smallest_float": torch.finfo(torch.float32).min, "minus_infinity": -math.inf, "positive": 100.0}
        mask = mask_of(value.get(how, -100.0))
        if how == "slopes":
            mask = -0.3 * (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs().float()
        if how == "mask_and_bias_in_one":
            mask[0, 0] = -3.0
        if how == "zeros":
            mask = torch.zeros_like(mask)
        self.register_buffer("mask", mask)
        self.learned_mask = nn.Parameter(mask_of(-100.0))
        self.table = nn.Parameter(torch.randn(2 * TOKENS - 1, HEADS))
        self.register_buffer("index", torch.arange(TOKENS)[:, None] - torch.arange(TOKENS) + TOKENS - 1)

    def forward(self, x: Tensor) -> Tensor:
        count = len(x)
        split = self.qkv(x).reshape(count, TOKENS, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        if self.how.startswith("attention"):
            mask, causal = (~self.excluded, False) if self.how == "attention_boolean" else (None, True)
            context = nn.functional.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        else:
            scores = self.masked(query @ key.transpose(-2, -1) * 0.35, x)
            context = scores.softmax(-1) @ value
        return context.transpose(1, 2).reshape(count, TOKENS, WIDTH)

    def masked(self, scores: Tensor, x: Tensor) -> Tensor:
        match self.how:
            case "windows":
                shape = scores.shape
                return (scores.view(-1, 1, HEADS, TOKENS, TOKENS) + self.mask[None, None]).view(shape)
            case "bias_plus_mask" | "mask_plus_bias":  # a library adds them up before it gives them to attention
                parts = self.table[self.index].permute(2, 0, 1), self.mask
                return scores + (parts[0] + parts[1] if self.how == "bias_plus_mask" else parts[1] + parts[0])
            case "mask_first":
                return self.mask + scores
            case "fill_minus_infinity":
                return scores.masked_fill(self.excluded, -math.inf)
            case "fill_minus_10000":
                return scores.masked_fill(self.excluded[None], -1e4)
            case "fill_minus_3":
                return scores.masked_fill(self.excluded, -3.0)
            case "two_masks":
                return (scores + self.mask).masked_fill(self.excluded.T, -math.inf)
            case "behind_a_bias" | "position_bias":
                biased = scores + self.table[self.index].permute(2, 0, 1)[None]
                return biased + self.mask if self.how == "behind_a_bias" else biased
            case "made_for_the_batch":  # as transformers extends a mask of tokens
                kept = torch.ones(len(x), TOKENS)
                kept[:, 12:] = 0
                return scores + (1 - kept)[:, None, None] * torch.finfo(torch.float32).min
            case "made_by_filling":
                return scores + x.new_zeros(len(x), 1, 1, TOKENS).masked_fill(self.excluded[0], -1e9)
            case "made_of_a_buffer":
                return scores + self.excluded.float() * -1e4
            case "made_boolean":
                masked = torch.zeros(len(x), TOKENS, dtype=torch.bool)
                masked[:, -4:] = True
                return scores.masked_fill(masked[:, None, None], -math.inf)
            case "infinite_from_the_image":
                masked = (x.mean(-1) > 0.1)[:, None, None].expand(-1, HEADS, TOKENS, -1)
                masked = masked & ~torch.eye(TOKENS, dtype=torch.bool)
                return torch.zeros_like(masked, dtype=x.dtype).masked_fill(masked, -math.inf) + scores
            case "infinite_where":
                shown = ((x.mean(-1) < 0.1)[:, None] | torch.eye(TOKENS, dtype=torch.bool))[:, None]
                return scores + torch.where(shown, 0.0, -math.inf)
            case "infinite_and_causal":  # nn.MultiheadAttention adds up the two that it is given
                masked = (x.mean(-1) > 0.1) & (torch.arange(TOKENS) > 0)
                padding = torch.zeros_like(masked, dtype=x.dtype).masked_fill(masked, -math.inf)[:, None, None]
                causal = torch.zeros(TOKENS, TOKENS).masked_fill(torch.ones(TOKENS, TOKENS).triu(1) > 0, -math.inf)
                return scores + (causal + padding.expand(-1, HEADS, TOKENS, -1))
            case "other_for_late_images":
                late, places = torch.arange(len(x))[:, None] > 7, torch.arange(TOKENS)
                return scores + torch.where((places > 12) | (late & (places > 3)), -100.0, 0.0)[:, None, None]
            case "other_for_each_head":
                heads = torch.stack([self.excluded, self.excluded.T]).repeat(len(x), 1, 1)
                return (scores.flatten(0, 1) + heads.float() * -100.0).view(scores.shape)
            case "learned_for_the_batch":
                return scores + self.learned_mask.expand(len(x), 1, -1, -1) * 1.0
            case "other_for_each_image":
                return scores - 100.0 * (torch.arange(len(x))[:, None] % TOKENS == torch.arange(TOKENS))[:, None, None]
            case "learned_mask":
                return scores + self.learned_mask
            case "from_the_image":
                return scores + torch.where(x.mean(-1) > 0, 0.0, -100.0)[:, None, None]
            case _:
                return scores + self.mask


class Model(nn.Module):
    """An attention for each way, side by side."""

    def __init__(self, *ways: str) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.attentions = nn.ModuleDict({how: Attention(how) for how in ways})
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        stream = x
        for attention in self.attentions.values():
            stream = stream + attention(x)
        return self.head(stream.mean(1))


def photos(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def make(*ways: str) -> nn.Module:
    torch.manual_seed(0)
    return Model(*ways).eval()


@pytest.fixture(scope="module")
def captured() -> GraphModule:
    return capture(make(*MASKS, *NO_MASKS), photos(2))


def softmax_of(module: GraphModule, how: str) -> Node:
    (found,) = [
        node for node in module.graph.nodes if calls(node, SOFTMAX) and node.meta["module"] == f"attentions.{how}"
    ]
    return found


@pytest.mark.parametrize("how", MASKS)
def test_what_hides_entries_is_a_mask(captured: GraphModule, how: str) -> None:
    read = arguments(softmax_of(captured, how))[0]
    scores = unmasked(captured, read)
    assert scores is not read
    assert not is_mask_on(captured, scores)
    masks = masks_between(captured, scores, read)
    assert len(masks) == MASKS[how]
    assert all(is_mask_on(captured, mask) for mask in masks)
    assert calls(scores, {aten.add}) == ("bias" in how)  # the bias belongs to the scores


@pytest.mark.parametrize("how", NO_MASKS)
def test_what_is_learned_or_has_other_values_is_no_mask(captured: GraphModule, how: str) -> None:
    read = arguments(softmax_of(captured, how))[0]
    assert unmasked(captured, read) is read
    assert masks_between(captured, read, read) == []


class Widened(nn.Module):
    """Scores of one head, to which a bias and a mask for each head are added as one."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, WIDTH, 8, 8), nn.Linear(WIDTH, 5)
        self.bias = nn.Parameter(torch.randn(TOKENS, TOKENS))
        self.register_buffer("mask", mask_of(-100.0).repeat(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        scores = (x @ x.mT)[:, None] + (self.bias + self.mask)
        return self.head((scores.softmax(-1) @ x[:, None]).mean((1, 2)))


class Shapes(Interpreter):
    """Runs a graph and compares what its nodes say of their shape."""

    def run_node(self, n: Node) -> object:
        found = super().run_node(n)
        if isinstance(found, Tensor) and n.op == "call_function":
            said = n.meta["shape"]
            assert all(each in (-1, size) for each, size in zip(said, found.shape, strict=True)), n.name
        return found


def test_what_widens_the_scores_keeps_its_shapes() -> None:
    torch.manual_seed(0)
    module = capture(Widened().eval(), photos(2))
    Shapes(module).run(photos(2))


@pytest.fixture(scope="module")
def by_minmax() -> QuantizedModel:
    return vitquant.quantize(make(*MASKS, "learned_mask"), "minmax", [photos()])


@pytest.fixture(scope="module")
def by_fq_vit() -> QuantizedModel:
    return vitquant.quantize(make(*MASKS), "fq-vit", [photos()], simulated=True)  # two masks depend on the image


def value_of(model: QuantizedModel, how: str, operand: str) -> str:
    """The name of the value that an operand (`softmax:input`) of one of the attentions reads."""
    kind, _, which = operand.partition(":")
    for value in model.values:
        for reader in value.readers:
            if (reader.kind, reader.operand, reader.module) == (kind, which, f"attentions.{how}"):
                return value.name
    raise AssertionError(f"{how} has no {operand}")


def tapped(model: QuantizedModel, name: str, quantized: bool) -> Tensor:
    seen: list[Tensor] = []
    with torch.no_grad():
        model.run(photos(), {name: lambda x: seen.append(x.clone())}, quantized=quantized)
    return seen[0]


@pytest.mark.parametrize("how", [*MASKS, "learned_mask"])
def test_a_mask_does_not_widen_the_range_of_the_scores(by_minmax: QuantizedModel, how: str) -> None:
    name = value_of(by_minmax, how, "softmax:input")
    scores = tapped(by_minmax, name, quantized=False)
    low, high = by_minmax.quantizers[name].range()
    step = by_minmax.quantizers[name].scale
    assert abs(low - scores.min()) <= step
    assert abs(high - scores.max()) <= step
    assert (scores.min() < -50) == (how == "learned_mask")


@pytest.mark.parametrize("how", [how for how in MASKS if not how.startswith("infinite")])  # others move with the image
def test_a_hidden_entry_has_no_probability_and_a_visible_one_its_own(by_fq_vit: QuantizedModel, how: str) -> None:
    name = value_of(by_fq_vit, how, "context:probs")
    found, expected = tapped(by_fq_vit, name, quantized=True), tapped(by_fq_vit, name, quantized=False)
    masked = (expected < 1e-20).any(0, keepdim=True).expand_as(found)
    assert masked.any()
    assert not found[masked].any()
    visible = expected > 2**-13
    assert bool((torch.log2(found[visible] / expected[visible]).abs() < 1.2).all())  # to the nearest power of two


def test_masked_softmaxes_are_computed_on_codes(by_fq_vit: QuantizedModel) -> None:
    assert by_fq_vit.float_reasons == {}
    graph = by_fq_vit.graph_module.graph
    filled = [arguments(node)[2] for node in graph.nodes if calls(node, {aten.masked_fill})]
    assert filled == [-math.inf] * sum(MASKS.values())


@pytest.mark.parametrize("recipe", ["by_minmax", "by_fq_vit"])
def test_without_its_quantizers_a_masked_model_is_the_float_one(recipe: str, request: pytest.FixtureRequest) -> None:
    quantized = request.getfixturevalue(recipe)
    ways = [*MASKS, "learned_mask"] if recipe == "by_minmax" else list(MASKS)
    x = photos(3, seed=1)
    with torch.no_grad():
        expected, found = make(*ways)(x), quantized(x)
        torch.testing.assert_close(quantized.run(x, {}, quantized=False), expected, rtol=0, atol=1e-5)
    assert torch.isfinite(found).all()
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.97


@pytest.mark.parametrize("value", [-100.0, -1e9])
def test_a_row_that_is_hidden_whole_keeps_its_softmax_in_float(value: float) -> None:
    model = make("minus_100")
    with torch.no_grad():
        model.get_submodule("attentions.minus_100").mask[3] = value
    with pytest.raises(LoweringError, match="covers every entry of a row: give every row at least one"):
        vitquant.quantize(model, "fq-vit", [photos()])
    quantized = vitquant.quantize(model, "fq-vit", [photos()], simulated=True)
    with torch.no_grad():
        assert torch.isfinite(quantized(photos())).all()


def test_rows_are_hidden_whole_by_one_mask_or_by_several() -> None:
    causal, padding = torch.ones(4, 4, dtype=torch.bool).triu(1), torch.tensor([-1e9, 0.0, 0.0, 0.0])
    assert not masks_whole_rows([])
    assert not masks_whole_rows([causal])
    assert not masks_whole_rows([padding])
    assert masks_whole_rows([causal, padding])  # the first row sees the first entry only
    assert masks_whole_rows([padding, causal, torch.zeros(7, 3, 5)])
    assert not masks_whole_rows([causal, padding.flip(0)])
    assert masks_whole_rows([torch.full((2, 1), -100.0)])


def test_masks_made_for_a_batch_are_constants_of_the_program() -> None:
    found = vitquant.quantize(make(*(how for how in MASKS if how.startswith("made"))), "fq-vit", [photos()])
    with torch.inference_mode():
        integers = interpreted(vitquant.lower(found))(photos(5, seed=1))
        assert torch.equal(integers, ExactSimulation(found)(photos(5, seed=1)).float())


def boolean_of(x: Tensor) -> Tensor:
    masked = torch.zeros(len(x), TOKENS, dtype=torch.bool)
    masked[:, -4:] = True
    return masked[:, None].expand(-1, TOKENS, -1)


def float_of(x: Tensor) -> Tensor:
    return x.new_zeros(len(x), TOKENS, TOKENS).masked_fill(boolean_of(x), -100.0)


READ = {
    "sum": lambda x: (x @ x.mT + float_of(x)).softmax(-1) @ x,
    "sum, mask first": lambda x: (float_of(x) + x @ x.mT).softmax(-1) @ x,
    "filled": lambda x: (x @ x.mT).masked_fill(boolean_of(x), -math.inf).softmax(-1) @ x,
    "baddbmm": lambda x: torch.baddbmm(float_of(x), x, x.mT).softmax(-1) @ x,
    "attention, boolean": lambda x: nn.functional.scaled_dot_product_attention(x, x, x, ~boolean_of(x)),
    "attention, float": lambda x: nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=float_of(x)),
}


@pytest.mark.parametrize("read", READ)
def test_a_mask_made_for_a_batch_is_a_constant_whatever_reads_it(read: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, WIDTH, 8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return READ[read](self.patches(x).flatten(2).mT)

    model = Model().eval()
    captured = capture(model, photos(2))
    fills = {*FILLS, aten.full, aten.zeros, aten.ones}
    assert not [node for node in captured.graph.nodes if calls(node, fills)]
    with torch.no_grad():
        torch.testing.assert_close(captured(photos(5, seed=1)), model(photos(5, seed=1)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_scores_with_a_mask_that_is_not_known_are_refused(value: float) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.head = nn.Conv2d(3, WIDTH, 8, 8), nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).mT
            mask = (x.mean(-1) > 0.1)[:, None].float() * value
            return self.head((x + (x @ x.mT + mask).softmax(-1) @ x).mean(1))

    torch.manual_seed(0)
    with pytest.raises(
        CalibrationError, match=r"softmax:input: scores go down to -.*masked_fill\(masked, -torch.inf\)"
    ):
        vitquant.quantize(Model().eval(), "minmax", [photos()])


def timm_swin() -> nn.Module:
    import timm

    sizes = {"depths": (2,), "embed_dim": 16, "num_heads": (2,), "img_size": 32, "window_size": 4, "num_classes": 5}
    return timm.create_model("swin_tiny_patch4_window7_224", **sizes)


def transformers_swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4, "image_size": 32, "num_labels": 5}
    return SwinForImageClassification(SwinConfig(**sizes))


def torchvision_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 16, [2], [2], [4, 4], num_classes=5)


@pytest.mark.parametrize("library", [timm_swin, transformers_swin, torchvision_swin])
def test_shifted_windows_of_every_library_keep_the_range_of_their_scores(library) -> None:
    torch.manual_seed(0)
    model = library().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    quantized = vitquant.quantize(model, "minmax", [photos()])
    inputs = [name for name in quantized.quantizers if name.endswith("softmax:input")]
    assert len(inputs) == 2
    assert all(quantized.quantizers[name].range()[0] > -20 for name in inputs)
    x = photos(3, seed=1)
    with torch.no_grad():
        expected, found = (getattr(y, "logits", y) for y in (model(x), quantized(x)))
    assert torch.isfinite(found).all()
    assert (found - expected).norm() < 0.25 * expected.norm()

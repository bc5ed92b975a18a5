"""What is folded into a LayerNorm and the layers behind it leaves every architecture's function as it was."""

import copy
import re

import pytest
import torch
from architectures import STAGES, ZOO, AttentionNet, EncoderNet, Patches, from_timm, vary
from torch import nn
from torch.utils import _pytree as pytree

from vitquant.graph.capture import capture
from vitquant.graph.layer_norm_folding import NotFoldableError, fold, foldable_norm
from vitquant.graph.sites import find_sites


def folded(captured):
    """How many LayerNorms were folded with random numbers, and why the others were not."""
    generator, refused, count = torch.Generator().manual_seed(0), {}, 0
    nodes = {node.name: node for node in captured.graph.nodes}
    for site in find_sites(captured):
        if site.kind != "layer_norm":
            continue
        try:
            layers = foldable_norm(captured, nodes[site.node])
        except NotFoldableError as reason:
            refused[site.name] = str(reason)
            continue
        channels = len(layers.norm.weight)
        random = torch.randn(2, channels, dtype=torch.float64, generator=generator)
        fold(layers, random[0].exp(), random[1] * layers.shiftable)
        count += 1
    return count, refused


def captured_in_float64(name):
    build, size = ZOO[name]
    torch.manual_seed(0)
    model = build().eval().double()
    vary(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) and module.weight is not None:
                module.weight[0] = 0.0  # as the real DeiT-Tiny has two of
    return capture(model, torch.randn(2, 3, size, size, dtype=torch.float64)), size


@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_function_stays_the_same(name):
    captured, size = captured_in_float64(name)
    changed = copy.deepcopy(captured)
    count, refused = folded(changed)
    assert count + len(refused) == sum(site.kind == "layer_norm" for site in find_sites(captured))
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        pairs = zip(pytree.tree_leaves(changed(images)), pytree.tree_leaves(captured(images)), strict=True)
        for found, expected in pairs:
            if isinstance(found, torch.Tensor) and found.is_floating_point():
                assert torch.allclose(found, expected, rtol=0, atol=1e-12 * float(1 + expected.abs().max()))


EVERY = {"timm deit": 5, "transformers vit": 5, "torchvision vit": 5, "timm swin": 9, "torchvision swin": 9}


@pytest.mark.parametrize("name", sorted(EVERY))
def test_norms_of_plain_transformers_are_folded(name):
    count, refused = folded(captured_in_float64(name)[0])
    assert count == EVERY[name], refused


PADDED = {**STAGES, "img_size": 48}  # 6 x 6 tokens in windows of 4 x 4


def test_beside_padding_and_in_front_of_a_layer_without_bias_a_norm_is_scaled_but_not_shifted():
    torch.manual_seed(0)
    model = from_timm("swin_tiny_patch4_window7_224", **PADDED)().eval().double()
    vary(model)
    images = torch.randn(3, 3, 48, 48, dtype=torch.float64)
    captured = capture(model, images)
    nodes = {node.name: node for node in captured.graph.nodes}
    sites = [site for site in find_sites(captured) if re.fullmatch(r"(blocks|merge)\.\d\.norm\d?", site.name)]
    norms = {site.name: nodes[site.node] for site in sites}
    assert {name for name, norm in norms.items() if not foldable_norm(captured, norm).shiftable} == {
        "blocks.2.norm1",  # padded
        "blocks.3.norm1",
        "merge.0.norm",  # its reduction has no bias
    }
    padded = foldable_norm(captured, norms["blocks.2.norm1"])
    channels = len(padded.norm.weight)
    ratio, shift = torch.full((channels,), 2.0, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)
    with pytest.raises(NotFoldableError, match="cannot be shifted"):
        fold(padded, ratio, shift)
    fold(padded, ratio, 0 * shift)
    with torch.no_grad():
        assert torch.allclose(captured(images), model(images), rtol=0, atol=1e-12)


def test_what_else_reads_a_norm_or_its_weights_is_named():
    captured, _ = captured_in_float64("encoder post-norm relu")
    nodes = {node.name: node for node in captured.graph.nodes}
    reasons = []
    for site in find_sites(captured):
        if site.kind == "layer_norm":
            with pytest.raises(NotFoldableError) as refused:
                foldable_norm(captured, nodes[site.node])
            reasons.append(str(refused.value))
    assert len(reasons) == 4
    assert all("reads it too, which is no linear layer" in reason for reason in reasons)  # the residual, the pooling
    tied = EncoderNet(norm_first=True)
    tied.encoder.layers[1].linear1.weight = tied.encoder.layers[0].linear1.weight
    captured = capture(tied.eval(), torch.randn(2, 3, 32, 32))
    nodes = {node.name: node for node in captured.graph.nodes}
    site = next(site for site in find_sites(captured) if site.name == "blocks.0.norm2")
    with pytest.raises(NotFoldableError, match="is used elsewhere too"):
        foldable_norm(captured, nodes[site.node])


class Rearranged(nn.Module):
    """A LayerNorm whose channels another axis takes the place of before a linear layer reads it."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.patches, self.norm, self.mixer = Patches(16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.net = AttentionNet(batch_first=True)

    def forward(self, images):
        return self.net(images)["logits"], self.mixer(self.how(self.norm(self.patches(images))))


@pytest.mark.parametrize(
    "how",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x.permute(0, 2, 1),
        lambda x: x.movedim((1, 2), (2, 1)),
        lambda x: x.roll(1, -1),
        lambda x: x.roll(1),
        lambda x: x.flip(-1),
        lambda x: torch.cat([x[..., 8:], x[..., :8]], -1),
        lambda x: x.reshape(len(x), 4, 4, 16).flatten(1)[:, :16],
        lambda x: nn.functional.pad(x[..., 1:], (1, 0)),
        lambda x: nn.functional.pad(x, (1, -1)),
    ],
)
def test_channels_that_move_are_noticed(how):
    captured = capture(Rearranged(how).eval(), torch.randn(2, 3, 32, 32))
    nodes = {node.name: node for node in captured.graph.nodes}
    for site in find_sites(captured):
        if site.kind == "layer_norm":
            with pytest.raises(NotFoldableError, match=r"moves its channels|no linear layer"):
                foldable_norm(captured, nodes[site.node])


class BesidePadding(nn.Module):
    """A LayerNorm that a linear layer reads as it is, and something else behind zeros."""

    def __init__(self, behind):
        super().__init__()
        self.patches, self.norm, self.mixer = Patches(16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.behind, self.net = behind, AttentionNet(batch_first=True)

    def forward(self, images):
        normalized = self.norm(self.patches(images))
        padded = nn.functional.pad(normalized, (0, 0, 0, 1))
        return self.net(images)["logits"], self.mixer(normalized), self.behind(padded)


@pytest.mark.parametrize(
    "behind", [nn.Identity(), nn.ReLU(), nn.Conv1d(17, 4, 1), lambda x: x.mean(1), lambda x: x + 1]
)
def test_who_reads_a_norm_behind_padding_is_looked_at_too(behind):
    captured = capture(BesidePadding(behind).eval(), torch.randn(2, 3, 32, 32))
    (site,) = [site for site in find_sites(captured) if site.kind == "layer_norm"]
    (node,) = [node for node in captured.graph.nodes if node.name == site.node]
    with pytest.raises(NotFoldableError, match="reads it too, which is no linear layer"):
        foldable_norm(captured, node)


def test_a_norm_is_folded_into_the_layer_behind_padding_beside_another():
    torch.manual_seed(0)
    model = BesidePadding(nn.Linear(16, 5)).eval().double()
    vary(model)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    captured = capture(model, images)
    assert folded(captured) == (1, {})
    with torch.no_grad():
        for found, expected in zip(captured(images), model(images), strict=True):
            assert torch.allclose(found, expected, rtol=0, atol=1e-12)

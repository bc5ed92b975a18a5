"""Padding that only a max pool reads: minus infinity is no value of the network."""

import math

import pytest
import timm
import torch
from architectures import CLASSES, PLAIN, Handwritten
from torch import nn
from torch.nn import functional

import vitquant
from vitquant.errors import CalibrationError
from vitquant.graph.capture import capture
from vitquant.graph.sites import find_sites, find_values

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Stem(Handwritten):
    """A convolution and a max pool before the patches."""

    def __init__(self, pool):
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 3, 3, padding=1), pool

    def forward(self, x):
        return super().forward(self.pool(functional.gelu(self.stem(x))))


def padded(*sizes, value=-math.inf, ceil=False):
    def pool(x):
        for size in sizes:
            x = functional.pad(x, size, value=value)
        return functional.max_pool2d(x, 3, 1, ceil_mode=ceil)

    return pool


POOLS = {
    "its own": nn.MaxPool2d(3, 1, 1),
    "rounded up": nn.MaxPool2d(3, 1, 1, ceil_mode=True),
    "pad": padded((1, 1, 1, 1)),
    "pads": padded((1, 1), (0, 0, 1, 1)),
    "a small number": padded((1, 1, 1, 1), value=torch.finfo(torch.float32).min),
    "ConstantPad2d": nn.Sequential(nn.ConstantPad2d(1, -math.inf), nn.MaxPool2d(3, 1)),
}


@pytest.mark.parametrize("recipe", ["minmax", pytest.param("repq-vit", marks=pytest.mark.slow)])
def test_padding_of_every_kind_gives_the_same_model(recipe):
    found = {}
    for name, pool in POOLS.items():
        torch.manual_seed(0)
        model = Stem(pool).eval()
        with torch.no_grad():
            found[name] = vitquant.quantize(model, recipe, [IMAGES], simulated=True)(IMAGES)
            assert torch.isfinite(found[name]).all()
    assert all(torch.equal(each, found["its own"]) for each in found.values())


def test_the_operand_is_what_was_padded():
    captured = capture(Stem(POOLS["pad"]).eval(), IMAGES)
    pool = next(site for site in find_sites(captured) if site.kind == "pool" and "pool" in site.node)
    nodes = {node.name: node for node in captured.graph.nodes}
    assert nodes[pool.operands["input"]].meta["shape"] == (-1, 3, 32, 32)
    value = next(value for value in find_values(captured, find_sites(captured)) if value.node == pool.operands["input"])
    assert value.shape == (-1, 3, 32, 32)


def test_zeros_are_padded_as_before_and_infinity_that_is_read_is_refused():
    captured = capture(Stem(padded((1, 1, 1, 1), value=0.0)).eval(), IMAGES)
    nodes = {node.name: node for node in captured.graph.nodes}
    pool = next(site for site in find_sites(captured) if site.kind == "pool" and "pool" in site.node)
    assert nodes[pool.operands["input"]].meta["shape"] == (-1, 3, 34, 34)
    mean = Stem(lambda x: functional.avg_pool2d(functional.pad(x, (1, 1, 1, 1), value=-math.inf), 3, 1)[..., :32, :32])
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        vitquant.quantize(mean.eval(), "minmax", [IMAGES])


@pytest.mark.parametrize("recipe", ["fq-vit", "repq-vit"])
def test_timms_hybrid_stem_is_quantized(recipe):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_r_s16_p8_224", num_classes=CLASSES, **{**PLAIN, "depth": 1, "img_size": 64})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.isfinite(vitquant.quantize(model.eval(), recipe, [images], simulated=True)(images)).all()

"""A recipe that promises integers keeps it or is refused, before calibration wherever it can be known."""

import re

import pytest
import timm
import torch
from torch import nn

import vitquant
from vitquant.errors import LoweringError
from vitquant.lowering import promised
from vitquant.model.saved import digest
from vitquant.recipe import load_recipe, override

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}


def vit():
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(**VIT).eval()


def photos():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class Counting:
    """Calibration batches that count how often they are gone through to the end."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        yield from photos().split(2)
        self.passes += 1


@pytest.mark.parametrize(
    ("recipe", "bits", "suggested"),
    [
        ("fq-vit", "w8a8s8", "w8a8s4"),
        ("fq-vit", "w8a8s5", "w8a8s4"),
        ("fq-vit", "w10a12s4", "w10a8s4"),
        ("fq-vit", "w4a12s8r16", "w4a8s4r16"),  # the residual stream may have 16
        ("fq-vit+uniform-probs", "w8a8s12", "w8a8"),
        ("repq-vit+fully-integer", "w6a6", "w6a6s5"),
    ],
)
def test_bits_that_integers_do_not_take_are_refused_before_calibration_with_bits_that_they_take(
    recipe, bits, suggested
):
    data = Counting()
    with pytest.raises(LoweringError, match=rf"^\S+: .*{re.escape(recipe)} promises integers.*--simulated") as said:
        vitquant.quantize(vit(), recipe, data, bits=bits)
    assert data.passes == 0
    assert str(said.value).count("\n") == 0
    assert re.search(r"give --bits (\w+)", str(said.value)).group(1) == suggested
    assert vitquant.lower(vitquant.quantize(vit(), recipe, [photos()], bits=suggested))
    with pytest.raises(LoweringError):
        vitquant.lower(vitquant.quantize(vit(), recipe, [photos()], bits=bits, simulated=True))


def test_a_refusal_that_bits_cannot_mend_suggests_none():
    with pytest.raises(LoweringError, match=r"^blocks\.0.*fq-vit promises integers") as said:
        vitquant.quantize(vit(), "fq-vit", [photos()], bits="w8a8s8", settings=["norm-inputs.float=true"])
    assert "give --bits" not in str(said.value)


@pytest.mark.parametrize(
    ("recipe", "settings", "promises"),
    [
        ("fq-vit", [], True),
        ("fq-vit+wide-residual", [], True),
        ("repq-vit+fully-integer", [], True),
        ("fq-vit", ["integer-operations.softmax=published"], True),
        ("fq-vit", ["integer-operations.layer_norm=published"], False),
        ("fq-vit", ["integer-operations.activation=float"], False),
        ("fq-vit-published", [], False),
        ("minmax", [], False),
        ("repq-vit", [], False),
        ("vt-ptq+power-of-two-factor", [], False),
    ],
)
def test_a_recipe_promises_integers_by_its_method(recipe, settings, promises):
    assert (promised(override(load_recipe(recipe), settings)) is not None) is promises


@pytest.mark.parametrize(("recipe", "bits"), [("fq-vit-published", "w8a8s4"), ("minmax", "w8a8s12")])
def test_a_recipe_without_the_promise_is_taken_as_it_is(recipe, bits):
    quantized = vitquant.quantize(vit(), recipe, [photos()], bits=bits)
    with pytest.raises(LoweringError):
        vitquant.lower(quantized)


def test_the_rehearsal_leaves_the_model_as_it_would_be_without():
    kept, simulated = (
        vitquant.quantize(vit(), "fq-vit", [photos()], simulated=simulated) for simulated in (False, True)
    )
    assert digest(kept) == digest(simulated)


class Halves(nn.Module):
    """Reads the halves of an image on their own, so that each has a quantizer."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 32, (8, 4), (8, 4)), nn.Conv2d(3, 32, (8, 4), (8, 4))

    def forward(self, x):
        return (self.left(x[..., :16]) + self.right(x[..., 16:])).flatten(2).transpose(1, 2)


def test_what_the_ranges_decide_is_refused_after_calibration():
    model, data = vit(), Counting()
    model.patch_embed = Halves()
    halves = torch.tensor([1.0, 3.0]).repeat_interleave(16)
    same = vitquant.quantize(model, "fq-vit", [photos(), photos().flip(-1)])
    assert vitquant.lower(same)
    with pytest.raises(LoweringError, match=r"the image has two quantizers, and fq-vit promises integers"):
        vitquant.quantize(model, "fq-vit", [batch * halves for batch in data])

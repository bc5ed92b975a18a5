"""The recipe for whoever names none: it is chosen by the bits, lowers to integers, and can have overlays."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import vitquant
from vitquant.errors import RecipeError
from vitquant.methods.output_reconstruction import ReconstructOutputSettings
from vitquant.model.simulation import ExactSimulation
from vitquant.recipe import CHOICES, requested
from vitquant.runtime.on_images import interpreted

TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "num_classes": 5}
QUICK = {"reconstruct-output": ("reconstruct-output.steps=2",)}


@given(st.integers(2, 8), st.integers(2, 8), st.sampled_from(["", "s3", "s4r8", "S5"]))
def test_it_has_the_bits_asked_for_and_probabilities_that_integers_hold(weights, activations, rest):
    recipe, bits = requested("default", f"w{weights}a{activations}{rest}")
    assert (bits.weights, bits.activations) == (weights, activations)
    uniform = "+uniform-probs" in recipe.name
    assert bits.probs <= (8 if uniform else 5)  # powers of the root of two end at 5
    if rest:
        assert bits.probs == int(rest[1])
        assert not uniform  # equally spaced levels want more
    assert any(method.name == "integer-operations" for method in recipe.methods)


def test_narrower_bits_take_another_recipe():
    names = {bits: requested("default", bits)[0].name for bits in ("w8a8", "w8a8s5", "w6a6", "w4a8", "w4a4")}
    assert names["w4a4"] == names["w6a6"]
    assert set(names.values()) == {choice.recipe for choice in CHOICES}
    assert requested("default", None)[0].name == names["w8a8"]


def test_overlays_and_settings_go_over_it():
    recipe, _ = requested("default+uniform-probs", "w6a6s8", ["weights.observer=minmax"])
    assert recipe.name.endswith("+uniform-probs")
    assert next(rule.observer for rule in recipe.rules if rule.name == "weights") == "minmax"


@pytest.mark.parametrize("bits", ["w9a8", "w8a16"])
def test_more_bits_than_integers_have_are_refused(bits):
    with pytest.raises(RecipeError, match=r"8 bits at most"):
        requested("default", bits)


@pytest.mark.parametrize(
    ("recipe", "bits"), [("default", "w8a8r2"), ("default", "w6a6r12"), ("fq-vit+wide-residual", "w8a8r6")]
)
def test_bits_of_a_stream_that_has_others_are_refused(recipe, bits):
    with pytest.raises(RecipeError, match=r"'wide-stream' gives it 16: leave r out, or give --set wide-stream.bits="):
        requested(recipe, bits)
    assert str(requested("fq-vit", bits)[1]) == bits
    assert requested(recipe, bits, ["wide-stream.bits=r"])[1].residual == requested("fq-vit", bits)[1].residual


@pytest.mark.parametrize("recipe", ["repq-vit", "vt-ptq"])
def test_bits_of_a_stream_in_float_are_refused(recipe):
    with pytest.raises(RecipeError, match=r"no rule of .* gives them: leave r out"):
        requested(recipe, "w8a8r6")
    assert requested(f"{recipe}+fully-integer", "w8a8r6")[1].residual == 6


def test_a_rule_for_a_part_of_the_stream_leaves_the_rest_its_bits(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'format = 1\noverlay = true\nname = "mine"\ntitle = "mine"\n[[rule]]\nname = "one"\nsite = "blocks.0.*"\n'
        'kind = "residual"\nspec = { scheme = "uniform", bits = 16 }\noverride = true\n'
    )
    assert requested(f"fq-vit+{tmp_path / 'mine.toml'}", "w8a8r6")[1].residual == 6


class PostNorm(nn.Module):
    """Blocks whose stream is the norms' output, which the layers read as it is."""

    def __init__(self, decoder):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 5)
        kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
        self.layer = kind(16, 2, 32, batch_first=True)
        self.decoder = decoder

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        return self.head((self.layer(x, x) if self.decoder else self.layer(x)).mean(1))


@pytest.mark.parametrize("decoder", [False, True])
def test_post_norm_transformers_run_in_integers(decoder):
    torch.manual_seed(0)
    images = torch.randn(6, 3, 32, 32)
    model = PostNorm(decoder).eval()
    found = vitquant.quantize(model, "default", [images])
    widths = {quantizer.spec.bits for quantizer in found.quantizers.values()}
    with torch.inference_mode():
        assert torch.equal(interpreted(vitquant.lower(found))(images), ExactSimulation(found)(images).float())
        assert (found(images) - model(images)).norm() < 0.1 * model(images).norm()
    assert widths == {8, 16}


@pytest.mark.parametrize("bits", ["w6a6", "w4a8", "w4a4"])
def test_its_images_are_learned_from_four_times(bits):
    recipe, _ = requested("default", bits)
    assert recipe.calibration.images * 4 == ReconstructOutputSettings().steps * ReconstructOutputSettings().batch


@pytest.mark.parametrize("bits", ["w8a8", "w8a8s5", "w6a6", "w4a8", "w4a4"])
def test_it_runs_in_integers_as_simulated(bits):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **TINY).eval()
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    methods = {method.name for method in requested("default", bits)[0].methods}
    settings = [setting for name, quick in QUICK.items() if name in methods for setting in quick]
    found = vitquant.quantize(model, "default", images.split(3), bits=bits, settings=settings)
    with torch.inference_mode():
        integers, simulated = interpreted(vitquant.lower(found))(images), ExactSimulation(found)(images).float()
    assert torch.equal(integers, simulated)

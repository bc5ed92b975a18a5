"""RepQ-ViT from a float model to a quantized one, on tiny models of every library with random weights."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from architectures import ZOO, vary

import vitquant
from vitquant.errors import CalibrationError, LoweringError, RecipeError
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.graph.layer_norm_folding import foldable_norm
from vitquant.methods.calibrate import CalibrateSettings, calibrate
from vitquant.methods.context import Context
from vitquant.methods.scale_reparameterization import FINEST, ReparameterizeScalesSettings, reparameterize_scales
from vitquant.model import QuantizedModel
from vitquant.model.simulation import ExactSimulation
from vitquant.observers import build_observer
from vitquant.recipe import Method, Recipe
from vitquant.recipe.rule import Rule, SpecTemplate
from vitquant.runtime.on_images import interpreted
from vitquant.spec import PerAxis, QuantSpec, Uniform

LAYERS = Recipe(
    "layers",
    "inputs and weights of linear layers",
    rules=(
        Rule("inputs", kind=("linear",), operand=("input",), spec=SpecTemplate(Uniform(), "a"), observer="minmax"),
        Rule("weights", operand=("weight",), spec=SpecTemplate(Uniform(), "w", per="axis"), observer="minmax"),
    ),
    methods=(Method("calibrate"), Method("reparameterize-scales")),
    relative_cost=2,
)


def made(name):
    build, size = ZOO[name]
    torch.manual_seed(0)
    model = build().eval()
    vary(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm) and module.weight is not None:
                module.weight *= torch.exp(1.5 * torch.randn_like(module.weight))  # channels that differ in range
                module.weight[0] = 0.0  # as the real DeiT-Tiny has two of
    generator = torch.Generator().manual_seed(0)
    return model, torch.randn(8, 3, size, size, generator=generator)


def logits(output):
    return output if isinstance(output, torch.Tensor) else output[0] if isinstance(output, tuple) else output.logits


@pytest.mark.parametrize(
    "name", ["timm deit", "timm swin", "transformers vit", "transformers swin", "torchvision vit", "torchvision swin"]
)
def test_every_channel_of_a_shifted_norm_fills_all_levels(name):
    model, images = made(name)
    quantized = vitquant.quantize(model, LAYERS, images.split(4), bits="w8a4")
    record = next(record for record in quantized.records if record.method == "reparameterize-scales")
    shifted = [site for site, decision in record.decisions.items() if decision.get("shifted")]
    assert shifted
    nodes = {node.name: node for node in quantized.graph_module.graph.nodes}
    sites = {site.name: site for site in quantized.sites}
    readers = {site.node: site for site in quantized.sites}
    for norm in shifted:
        linear = next(iter(foldable_norm(quantized.graph_module, nodes[sites[norm].node]).linears))
        value, held = quantized.index.value(f"{readers[linear].name}:input").name, {}
        quantized.run(images, {value: lambda x, held=held: held.setdefault("x", x.clone())}, quantized=False)
        x = held["x"].flatten(0, -2)
        quantizer = quantized.quantizers[value]
        width = x.amax(0) - x.amin(0)
        assert torch.allclose(width[1:], 15 * quantizer.scale, rtol=1e-3)  # the first channel never varies
        assert bool(((quantizer(x) - x).abs() <= 0.501 * quantizer.scale).all())
    with torch.no_grad():
        assert torch.isfinite(logits(quantized(images))).all()


def test_the_float_function_stays_the_same_and_the_model_is_saved_as_it_is(tmp_path):
    model, images = made("timm deit")
    quantized = vitquant.quantize(model, LAYERS, images.split(4), bits="w4a4")
    with torch.no_grad():
        shifted = quantized.run(images, {}, quantized=False)
        assert torch.allclose(logits(shifted), logits(model(images)), atol=1e-4)
        quantized.save(tmp_path / "saved")
        restored = vitquant.load(tmp_path / "saved", model=made("timm deit")[0])
        assert torch.equal(logits(restored(images)), logits(quantized(images)))


def test_each_channel_s_codes_are_those_of_a_scale_of_its_own():
    model, images = made("timm deit")
    quantized = vitquant.quantize(model, LAYERS, images.split(4), bits="w8a4")
    name, held = "blocks.0.attn.qkv:input", {}
    quantized.run(images, {name: lambda x: held.setdefault("x", x.clone())}, quantized=False)
    codes = quantized.quantizers[name].encode(held["x"]).flatten(0, -2)
    assert bool((codes.amin(0)[1:] == 0).all())
    assert bool((codes.amax(0)[1:] == 15).all())  # the first channel never varies
    assert codes[:, 0].unique().numel() == 1


def test_a_channel_s_quantiles_are_the_best_for_a_quantizer_that_need_not_hold_zero():
    model, images = made("timm deit")
    with torch.no_grad():
        for block in model.blocks:
            block.norm1.bias += 4 * torch.randn_like(block.norm1.bias)  # channels far from zero
    rules = tuple(replace(rule, observer="best-percentile") for rule in LAYERS.rules)
    recipe = replace(LAYERS, rules=rules)
    name = "blocks.0.attn.qkv:input"
    plain = vitquant.quantize(model, replace(recipe, methods=recipe.methods[:1]), images.split(4), bits="w8a4")
    observer = build_observer("best-percentile", QuantSpec(4, granularity=PerAxis(-1)))
    for batch in images.split(4):
        plain.run(batch, {name: observer.update}, quantized=False)

    def mean_scale(low, high):
        scale = (high - low) / 15
        return float(scale.clamp(min=FINEST * float(scale.mean())).mean())

    free, holding_zero = mean_scale(*observer.free_range()), mean_scale(*observer.observed_range())
    assert free != pytest.approx(holding_zero, rel=1e-4)
    found = vitquant.quantize(model, recipe, images.split(4), bits="w8a4").quantizers[name].scale
    assert float(found) == pytest.approx(free, rel=1e-5)


def test_order_names_and_settings_are_checked():
    model, images = made("timm deit")
    quantized = QuantizedModel(CapturedModel(capture(model, images), (3, 32, 32)), LAYERS, LAYERS.bits)
    with pytest.raises(CalibrationError, match="is not calibrated"):
        reparameterize_scales(quantized, Context([images]), ReparameterizeScalesSettings())
    calibrate(quantized, Context([images]), CalibrateSettings())
    with pytest.raises(RecipeError, match=r"no LayerNorm is called blocks\.9"):
        reparameterize_scales(quantized, Context([images]), ReparameterizeScalesSettings(["blocks.9*"]))
    with pytest.raises(RecipeError, match="it is a list of globs"):
        ReparameterizeScalesSettings("blocks.*")
    with pytest.raises(CalibrationError, match="no calibration images"):
        reparameterize_scales(quantized, Context([]), ReparameterizeScalesSettings())


def test_norms_that_cannot_be_folded_say_why():
    model, images = made("encoder post-norm relu")
    quantized = vitquant.quantize(model, LAYERS, [images], bits="w8a8")
    record = next(record for record in quantized.records if record.method == "reparameterize-scales")
    assert record.summary["reparameterized"] == 0
    assert record.decisions
    assert all("no linear layer" in decision["one scale, because"] for decision in record.decisions.values())


LIBRARIES = "timm deit", "timm swin", "transformers vit", "transformers swin", "torchvision vit", "torchvision swin"


@pytest.mark.parametrize("name", LIBRARIES)
def test_fully_integer_it_lowers_to_its_simulation(name):
    build, size = ZOO[name]
    torch.manual_seed(0)
    model = build().eval()
    vary(model)
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    quantized = vitquant.quantize(Logits(model), "repq-vit+fully-integer", images.split(4), bits="w4a4")
    assert not quantized.float_reasons
    with torch.inference_mode():
        found, simulated = interpreted(vitquant.lower(quantized))(images), ExactSimulation(quantized)(images).float()
    assert torch.equal(found, simulated)
    assert found.unique().numel() > 5


def test_the_recipe_alone_stays_in_float_between_products():
    model, images = made("timm deit")
    quantized = vitquant.quantize(model, "repq-vit", [images])
    with pytest.raises(LoweringError, match=r"leaves \d+ operands in float, first .*: lay \+fully-integer over it"):
        vitquant.lower(quantized)
    kinds = {site.name: site.kind for site in quantized.sites}
    in_float = {kinds[name.partition(":")[0]] for name in set(quantized.assignments) - set(quantized.quantizers)}
    assert in_float == {"layer_norm", "softmax", "activation", "residual", "concat", "output"}


class Logits(torch.nn.Module):
    """A classifier that gives its logits only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return logits(self.model(images))


class ReluAttention(torch.nn.Module):
    """Attention without softmax, residual and blocks."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = torch.nn.Linear(16, 16), torch.nn.LayerNorm(16)
        self.qkv, self.head = torch.nn.Linear(16, 48), torch.nn.Linear(16, 5)

    def forward(self, images):
        query, key, value = self.qkv(self.norm(self.embed(images.flatten(1, 2)))).chunk(3, -1)
        return self.head((torch.relu(query @ key.transpose(-1, -2)) @ value).mean(1))


def test_the_settings_that_a_refusal_gives_serve_a_model_without_softmax_residual_and_blocks():
    images, settings = [torch.randn(8, 3, 4, 16)], []

    def quantized(recipe):
        return vitquant.quantize(ReluAttention(), recipe, images, settings=settings)

    with pytest.raises(RecipeError, match=r"'attention-probs' matches nothing .* no attention is found") as error:
        quantized("repq-vit+fully-integer")
    settings = re.findall(r"--set (\S+)", str(error.value))
    with pytest.raises(RecipeError, match=r"called blocks\.\* or merge\.\* \(there: \S+\); .* --set") as error:
        quantized("repq-vit+fully-integer")
    settings += re.findall("--set '(.+)'", str(error.value))
    record = next(
        record for record in quantized("repq-vit+fully-integer").records if record.method.startswith("repara")
    )
    assert record.summary == {"reparameterized": 1, "of": 1}
    settings = []
    with pytest.raises(RecipeError, match=r"nor does 'residual'") as error:
        quantized("minmax")
    settings = re.findall(r"--set (\S+)", str(error.value))
    quantized("minmax")

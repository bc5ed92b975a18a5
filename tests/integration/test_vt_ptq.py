"""VT-PTQ from a float model to a quantized one, on tiny models of every library with random weights."""

from __future__ import annotations

import pytest
import torch
from architectures import ZOO, vary

import vitquant
from vitquant.errors import CalibrationError, RecipeError
from vitquant.methods.context import Context
from vitquant.methods.scale_search import SearchScalesSettings, search_scales
from vitquant.model.simulation import ExactSimulation
from vitquant.objectives.correlation import correlation
from vitquant.runtime.on_images import interpreted

QUICK = ("search-scales.candidates=12", "search-scales.pairs=16")

LIBRARIES = (
    "timm deit", "timm swin", "timm levit", "timm cait", "timm beit", "transformers vit", "torchvision vit",
    "torchvision swin", "encoder post-norm relu", "einsum",
)  # fmt: skip


def made(name, count=6):
    build, size = ZOO[name]
    torch.manual_seed(0)
    model = build().eval()
    vary(model)
    return model, torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def quantized(name, *settings, bits="w4a4"):
    model, images = made(name)
    return vitquant.quantize(model, "vt-ptq", images.split(3), bits=bits, settings=[*QUICK, *settings]), images


def record_of(model):
    return next(record for record in model.records if record.method == "search-scales")


@pytest.mark.parametrize(
    "name", ["timm deit", "timm swin", "timm levit", "timm cait", "transformers vit", "torchvision swin", "einsum"]
)
def test_every_layer_of_every_library_is_searched(name):
    model, images = made(name, count=7)
    data = images.split(3)  # the last batch is smaller
    model = vitquant.quantize(model, "vt-ptq", data, bits="w4a4", settings=QUICK)
    record = record_of(model)
    searched = {value for value, decision in record.decisions.items() if "multiple" in decision}
    assert searched <= set(model.quantizers)
    assert len(searched) > 8
    assert all(0.5 <= record.decisions[value]["multiple"] <= 1.2 for value in searched)
    assert any(record.decisions[value]["multiple"] != 1.0 for value in searched)
    with torch.no_grad():
        output = model(images)
    leaves = output if isinstance(output, torch.Tensor) else output[0] if isinstance(output, tuple) else output.logits
    assert torch.isfinite(leaves).all()


def layer(model, site, x, bias):
    quantizers = model.quantizers
    weight = model.parameter(model.index.value(f"{site}:weight"))
    return torch.nn.functional.linear(quantizers[f"{site}:input"](x), quantizers[f"{site}:weight"](weight), bias)


def test_no_other_scale_of_an_operand_gives_a_higher_correlation():
    model, images = quantized("timm deit", "search-scales.bias_correction=false")
    site, held = "blocks.0.mlp.fc1", []
    model.run(images, {f"{site}:input": lambda x: held.append(x.clone())}, quantized=False)
    bias = model.graph_module.get_parameter("blocks.0.mlp.fc1.bias")
    weight = model.parameter(model.index.value(f"{site}:weight"))
    y = torch.nn.functional.linear(held[0], weight, bias)
    with torch.no_grad():
        best = correlation(y, layer(model, site, held[0], bias)).mean()
        for operand in ("input", "weight"):
            quantizer = model.quantizers[f"{site}:{operand}"]
            chosen = quantizer.scale.clone()
            start = chosen / record_of(model).decisions[f"{site}:{operand}"]["multiple"]
            for multiple in torch.linspace(0.5, 1.2, 12):
                quantizer.scale.copy_(start * multiple)
                assert correlation(y, layer(model, site, held[0], bias)).mean() <= best + 1e-6
            quantizer.scale.copy_(chosen)


def test_biases_are_corrected_to_the_float_means():
    model, images = quantized("timm deit")
    float_model, _ = made("timm deit")
    site, held = "blocks.0.mlp.fc1", []
    with torch.no_grad():
        float_model.blocks[0].mlp.fc1.register_forward_hook(lambda _, given, made: held.extend([given[0], made]))
        float_model(images)
        bias = model.graph_module.get_parameter("blocks.0.mlp.fc1.bias")
        assert not torch.equal(bias, float_model.blocks[0].mlp.fc1.bias)
        found = layer(model, site, held[0], bias).mean((0, 1))
        assert torch.allclose(found, held[1].mean((0, 1)), atol=1e-4)
        plain, _ = quantized("timm deit", "search-scales.bias_correction=false")
        assert torch.equal(
            plain.graph_module.get_parameter("blocks.0.mlp.fc1.bias"), float_model.blocks[0].mlp.fc1.bias
        )


class Counted(list):
    """Batches that know how often they were gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_memory_is_a_budget_and_does_not_change_the_result():
    model, images = made("timm deit")
    results = []
    for memory in (1.0, 0.12304):  # all layers at once; the patch embedding alone
        data = Counted(images.split(3))
        found = vitquant.quantize(model, "vt-ptq", data, bits="w4a4", settings=QUICK, memory=memory)
        results.append((found, data.passes))
    (whole, few), (parts, more) = results
    assert more == few + 1
    for name, quantizer in whole.quantizers.items():
        assert torch.equal(quantizer.scale, parts.quantizers[name].scale)
    with pytest.raises(
        CalibrationError,
        match=r"^search-scales at patch_embed: it needs 0\.123 GB for 6 images.*give memory = 0\.13 ",
    ):
        vitquant.quantize(model, "vt-ptq", images.split(3), bits="w4a4", settings=QUICK, memory=1e-6)


def test_the_same_seed_gives_the_same_model():
    first, second = quantized("timm deit")[0], quantized("timm deit")[0]
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key])


def test_a_searched_model_is_saved_and_loaded_as_it_is(tmp_path):
    model, images = quantized("timm deit")
    model.save(tmp_path / "saved")
    restored = vitquant.load(tmp_path / "saved", model=made("timm deit")[0])
    with torch.no_grad():
        assert torch.equal(restored(images), model(images))


def test_what_several_layers_read_is_chosen_once():
    model, _ = quantized("transformers vit")
    shared = model.index.value("blocks.0.attn.query:input")
    assert len(shared.readers) == 3
    decision = record_of(model).decisions
    assert [name for name in decision if name in map(str, shared.readers)] == [shared.name]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("candidates=0", "candidates = 0: it is at least 1"),
        ("low=1.3", "0 < low < high"),
        ("gamma=-1", "gamma = -1: it is at least 0"),
        ("rounds=1.5", "rounds = 1.5 should be an integer"),
        ("gamma=nan", "gamma = nan should be a finite number"),
        ("depth=3", "unknown key 'depth'"),
    ],
)
def test_settings_without_meaning_are_refused(setting, message):
    model, images = made("timm deit")
    with pytest.raises(RecipeError, match=message):
        vitquant.quantize(model, "vt-ptq", [images], settings=[f"search-scales.{setting}"])


def test_data_are_checked():
    floating, _ = quantized("timm deit")
    with pytest.raises(CalibrationError, match="no calibration images"):
        search_scales(floating, Context([]), SearchScalesSettings())


@pytest.mark.parametrize("name", ["timm deit", "timm swin", "torchvision swin"])
@pytest.mark.parametrize("recipe", ["vt-ptq+fully-integer", "repq-vit+searched-scales+fully-integer"])
def test_fully_integer_it_lowers_to_its_simulation(name, recipe):
    model, images = made(name)
    found = vitquant.quantize(model, recipe, images.split(3), bits="w4a4", settings=QUICK)
    with torch.inference_mode():
        integers, simulated = interpreted(vitquant.lower(found))(images), ExactSimulation(found)(images).float()
    assert torch.equal(integers, simulated)


def test_the_residual_stream_alone_can_have_power_of_two_factors():
    model, images = made("timm deit")
    plain = vitquant.quantize(model, "vt-ptq", images.split(3), bits="w4a4", settings=QUICK)
    found = vitquant.quantize(model, "vt-ptq+power-of-two-factor", images.split(3), bits="w4a4", settings=QUICK)
    norms = set(found.quantizers) - set(plain.quantizers)
    assert norms
    assert all(value.startswith("blocks.") or value.startswith("norm") for value in norms)
    assert all(found.quantizers[name].factor is not None for name in norms)
    for name, quantizer in plain.quantizers.items():
        assert torch.equal(quantizer.scale, found.quantizers[name].scale)
    with pytest.raises(RecipeError, match="of overlay 'fully-integer' sets what rule 'residual-stream'"):
        vitquant.quantize(model, "vt-ptq+power-of-two-factor+fully-integer", [images])


class Awkward(torch.nn.Module):
    """Layers whose weight is computed or shared, whose bias is computed, and a convolution padded by a word."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding="same")
        self.patches = torch.nn.Conv2d(16, 16, 4, 4)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(16) for _ in range(2))
        self.shared = torch.nn.Linear(16, 16, bias=False)
        self.computed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(16, 16))
        self.mixer, self.bias = torch.nn.Parameter(torch.randn(16, 16)), torch.nn.Parameter(torch.randn(8))
        self.fc = torch.nn.Linear(16, 5)

    def forward(self, images):
        x = self.patches(self.stem(images)).flatten(2).mT
        for norm in self.norms:
            x = x + self.shared(norm(x)).relu()
        x = torch.nn.functional.linear(self.computed(x), self.mixer, torch.cat([self.bias, self.bias]))
        return self.fc(((x @ x.mT).softmax(-1) @ x).mean(1))


def test_layers_that_cannot_be_searched_say_why():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16)
    found = vitquant.quantize(Awkward().eval(), "vt-ptq", [images], settings=QUICK)
    reasons = {why["as calibrated, because"] for why in record_of(found).decisions.values() if len(why) == 1}
    assert reasons == {
        "it is no plain two-dimensional convolution",
        "its weight is computed or rearranged",
        "its bias is computed",
        "both of its operands are one value",
    }


def test_a_weight_that_two_norms_lead_to_is_not_folded():
    torch.manual_seed(0)
    model, images = Awkward().eval(), torch.randn(4, 3, 16, 16)
    found = vitquant.quantize(model, "repq-vit", [images], bits="w8a8", settings=['reparameterize-scales.sites=["*"]'])
    with torch.no_grad():
        assert torch.allclose(found.run(images, {}, quantized=False), model(images), atol=1e-4)
    record = next(record for record in found.records if record.method == "reparameterize-scales")
    reasons = [why["one scale, because"] for why in record.decisions.values()]
    assert reasons == ["shared.weight is used elsewhere too"] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_are_searched_in_float32(dtype):
    model, images = made("timm deit")
    narrow = vitquant.quantize(model.to(dtype), "vt-ptq", images.to(dtype).split(3), bits="w4a4", settings=QUICK)
    decisions = record_of(narrow).decisions
    assert sum(decision["multiple"] != 1.0 for decision in decisions.values()) > len(decisions) / 2


def test_scales_that_are_powers_of_two_stay_so():
    model, images = made("timm deit")
    settings = [*QUICK, "activations.scheme=power_of_two_scale"]
    found = vitquant.quantize(model, "vt-ptq", [images], settings=settings)
    scales = [q.scale for q in found.quantizers.values() if type(q.spec.scheme).__name__ == "PowerOfTwoScale"]
    assert scales
    assert all(bool((torch.frexp(scale).mantissa == 0.5).all()) for scale in scales)


def test_the_seed_decides_which_pairs_attention_is_ranked_by():
    """One pair of a row, and next to nothing else, decides: other pairs choose other scales."""

    def scales(seed):
        words = ("pairs=1", "gamma=1000.0", f"seed={seed}")
        model, _ = quantized("timm deit", *(f"search-scales.{each}" for each in words))
        return {name: each.scale.tolist() for name, each in model.quantizers.items() if ".scores:" in name}

    first = scales(0)
    assert first
    assert scales(0) == first
    assert any(scales(seed) != first for seed in (1, 2))

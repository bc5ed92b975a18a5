"""From a float model to a saved one and back, on models of every library, tiny and with random weights."""

import copy
import json

import pytest
import torch
from torch import nn

import vitquant
from vitquant.errors import CalibrationError, CaptureError, CheckpointError, ModelError, RecipeError
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.model import QuantizedModel
from vitquant.model.saved import digest
from vitquant.recipe import Bits, load_recipe
from vitquant.zoo import create


def timm_vit(**arguments):
    import timm

    tiny = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64, "num_classes": 7}
    return timm.create_model("vit_tiny_patch16_224", **{**tiny, **arguments}).eval()


def timm_swin():
    import timm

    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        depths=(2, 2),
        embed_dim=24,
        num_heads=(2, 4),
        img_size=64,
        window_size=4,
        num_classes=7,
    ).eval()


def transformers_deit():
    from transformers import DeiTConfig, DeiTForImageClassification

    return DeiTForImageClassification(
        DeiTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=64)
    ).eval()


def transformers_swin():
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(
        SwinConfig(embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4, image_size=64)
    ).eval()


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 16, 2, 3, 48, 96, num_classes=7).eval()


def torchvision_swin():
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=7).eval()


class Own(nn.Module):
    """A user's module: post-norm, sequence first, ReLU."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 16, 16)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 7)

    def forward(self, x):
        return self.head(self.encoder(self.patches(x).flatten(2).permute(2, 0, 1)).mean(0))


MODELS = [timm_vit, timm_swin, transformers_deit, transformers_swin, torchvision_vit, torchvision_swin, lambda: Own()]
RECIPES = ["minmax", "moving-average", "percentile", "omse"]


def trained(model):
    """Weights of a size that training would give them: libraries begin with tokens and heads of zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.1 * torch.randn(parameter.shape, generator=generator))
            elif parameter.shape[0] == 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model


def photos(count=6, size=64, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("make", MODELS)
def test_quantized_is_close_saved_and_reloaded_bit_for_bit(make, tmp_path):
    model = trained(make())
    before = copy.deepcopy(model.state_dict())
    quantized = vitquant.quantize(model, "minmax", photos().split(3))
    x = photos(3, seed=1)
    with torch.no_grad():
        expected, found = model(x), quantized(x)
    assert type(found) is type(expected)
    cosine = torch.cosine_similarity(logits(found).flatten(), logits(expected).flatten(), 0)
    assert 0.95 < cosine < 0.999999
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    quantized.save(tmp_path / "out")
    with torch.no_grad():
        for parameter in model.parameters():  # the architecture is enough
            parameter.normal_()
        again = vitquant.load(tmp_path / "out", model=model)
        assert torch.equal(logits(again(x)), logits(found))
        assert torch.equal(logits(again(x[:1])), logits(quantized(x[:1])))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_observer_is_close_at_8_bits_and_worse_at_4(recipe):
    model, x = trained(timm_vit()), photos(8, seed=1)
    errors = {}
    with torch.no_grad():
        for bits in ("w8a8", "w4a4"):
            quantized = vitquant.quantize(model, recipe, photos().split(3), bits=bits)
            errors[bits] = (quantized(x) - model(x)).norm() / model(x).norm()
    assert 0 < errors["w8a8"] < 0.2
    assert errors["w8a8"] < errors["w4a4"]


@pytest.mark.parametrize("bits", ["w2a8", "w3a5", "w4a4s4r8", "w8a8", "w6a16"])
def test_packed_weights_have_their_size_and_come_back(bits, tmp_path):
    quantized = vitquant.quantize(timm_vit(), "minmax", photos().split(3), bits=bits)
    quantized.save(tmp_path / "out")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "out" / "model.safetensors")
    weight = quantized.graph_module.blocks.get_submodule("0.mlp.fc1").weight
    width = Bits.parse(bits).weights
    assert stored["blocks.0.mlp.fc1.weight"].numel() == weight.numel() * width // 8
    x = photos(2, seed=3)
    assert torch.equal(vitquant.load(tmp_path / "out", model=timm_vit())(x), quantized(x))


def test_the_same_input_gives_the_same_file(tmp_path):
    for name in ("first", "second"):
        torch.manual_seed(0)
        vitquant.quantize(timm_vit(), "percentile", photos().split(3)).save(tmp_path / name)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_digest_is_that_of_what_was_loaded_and_of_no_other_model(tmp_path, dtype):
    model, images = timm_vit().to(dtype), [photos().to(dtype)]
    quantized = vitquant.quantize(model, "fq-vit", images)
    quantized.save(tmp_path / "out")
    assert digest(vitquant.load(tmp_path / "out", model=timm_vit().to(dtype))) == digest(quantized)
    others = [
        vitquant.quantize(model, "fq-vit", images, bits="w8a8s8", simulated=True),  # only a spec differs
        vitquant.quantize(model, "fq-vit", [2 * images[0]]),
        vitquant.quantize(timm_vit().to(dtype), "fq-vit", images),
    ]
    assert len({digest(quantized), *(digest(other) for other in others)}) == 4


def test_batches_may_be_tuples_or_mappings():
    model, x = timm_vit(), photos(2, seed=1)
    forms = [[photos()], [(photos(), torch.zeros(6))], [{"pixel_values": photos()}]]
    first, *others = [vitquant.quantize(model, "minmax", form)(x) for form in forms]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (photos(), r"the calibration data is one Tensor: give a list of batches, \[data\]"),
        ({"pixel_values": photos()}, r"the calibration data is one dict: give a list of batches"),
        (3, "the calibration data is of type int: give a list of batches"),
        ([photos()[:0]], r"got an empty one, \[0, 3, 64, 64\]"),
        ([photos()[0]], r"got a tensor of 3 dimensions, \[3, 64, 64\]"),
        ([photos().int()], "got a tensor of torch.int32"),
        ([(3, photos())], "got tuple of int"),
        (["photos"], "got str"),
        ([photos(), photos().double()], "batch is of torch.float64 and the first of torch.float32: give all of one"),
    ],
)
def test_what_is_no_list_of_like_batches_is_refused_with_the_reason(data, said):
    with pytest.raises(CalibrationError, match=said):
        vitquant.quantize(timm_vit(), "minmax", data)
    with pytest.raises(CalibrationError, match=said):
        vitquant.sensitivity(timm_vit(), "minmax", data)


def test_a_source_is_enough_to_reload(tmp_path):
    arguments = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 64, "num_classes": 7}
    source = vitquant.ModelSource("timm:vit_tiny_patch16_224", arguments, weights="random", seed=3)
    model = create(source)
    quantized = vitquant.quantize(model, "minmax", [photos()], source=source)
    quantized.save(tmp_path / "out")
    x = photos(2, seed=1)
    assert torch.equal(vitquant.load(tmp_path / "out")(x), quantized(x))
    assert torch.equal(vitquant.float_model(tmp_path / "out")(x), model(x))


def test_half_the_model_in_bfloat16_reloads_bit_for_bit(tmp_path):
    model = timm_vit().bfloat16()
    quantized = vitquant.quantize(model, "minmax", [photos().bfloat16()])
    quantized.save(tmp_path / "out")
    x = photos(2, seed=1).bfloat16()
    assert torch.equal(vitquant.load(tmp_path / "out", model=model)(x), quantized(x))


def test_a_grid_too_fine_for_bfloat16_reloads_bit_for_bit_too(tmp_path):
    model, name = trained(timm_vit()).bfloat16(), "blocks.0.mlp.fc1:weight"
    settings = ["weights.signed=false", "weights.symmetric=false"]
    quantized = vitquant.quantize(model, "minmax", [photos().bfloat16()], settings=settings)
    quantizer = quantized.quantizers[name]
    quantizer.scale.fill_((1 + 0.99 * 2**-8) / 255)  # the largest level rounds to 1.0 in bfloat16, a code lower
    quantizer.zero_point.fill_(0)
    with torch.no_grad():
        quantized.parameter(quantized.index.value(name)).fill_(2.0)  # clipped, as a searched scale clips
    codes = quantizer.encode(quantized.parameter(quantized.index.value(name)))
    quantized.save(tmp_path / "out")
    reloaded = vitquant.load(tmp_path / "out", model=model)
    assert torch.equal(reloaded.quantizers[name].encode(reloaded.parameter(reloaded.index.value(name))), codes)
    x = photos(2, seed=1).bfloat16()
    assert torch.equal(reloaded(x), quantized(x))


def test_a_tied_weight_stays_tied(tmp_path):
    model = timm_vit()
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    quantized = vitquant.quantize(model, "minmax", [photos()])
    quantized.save(tmp_path / "out")
    x = photos(2, seed=1)
    assert torch.equal(vitquant.load(tmp_path / "out", model=model)(x), quantized(x))


def test_values_read_several_times_have_one_quantizer():
    quantized = vitquant.quantize(transformers_deit(), "minmax", [photos()])
    assert "blocks.0.attn.query:input" in quantized.quantizers
    assert "blocks.0.attn.key:input" not in quantized.quantizers
    calls = [node for node in quantized.graph_module.graph.nodes if node.op == "call_module"]
    assert len(calls) == len(quantized.quantizers) == len(set(quantized.quantizers.values()))


def test_weights_are_on_their_grid():
    quantized = vitquant.quantize(timm_vit(), "minmax", [photos()], bits="w3a8")
    quantizer = quantized.quantizers["blocks.0.attn.qkv:weight"]
    weight = quantizer(quantized.graph_module.blocks.get_submodule("0.attn.qkv").weight)
    codes = quantizer.encode(weight)
    assert torch.equal(weight, codes * quantizer.scale[:, None])
    assert sorted(codes.unique().tolist()) == list(range(-4, 4))


def test_a_tap_sees_the_value_before_its_quantizer():
    model = timm_vit()
    quantized = vitquant.quantize(model, "minmax", [photos()])
    seen = []
    quantized.run(photos(2, seed=1), {"patch_embed:input": seen.append})
    assert torch.equal(seen[0], photos(2, seed=1))


@pytest.mark.parametrize("make", [timm_vit, timm_swin])
def test_taps_change_nothing_and_see_the_same_with_and_without_gradients(make):
    quantized = vitquant.quantize(trained(make()), "minmax", [photos()])
    x, seen = photos(2, seed=1), {True: [], False: []}
    expected = quantized(x)
    for gradients, values in seen.items():
        taps = {
            value.name: lambda tensor, values=values: values.append(tensor.detach().clone())
            for value in quantized.values
        }
        with torch.set_grad_enabled(gradients):
            assert torch.equal(quantized.run(x, taps), expected)
            assert torch.equal(quantized.run(x, {}), expected)
    assert len(seen[True]) == len(seen[False]) == len(quantized.values)
    assert all(torch.equal(left, right) for left, right in zip(seen[True], seen[False], strict=True))


def test_a_layer_norm_gain_of_zero_is_nothing_special():
    model = timm_vit()
    with torch.no_grad():
        model.blocks[0].norm1.weight[:2] = 0
    quantized = vitquant.quantize(model, "omse", [photos()])
    assert torch.isfinite(quantized(photos(2, seed=1))).all()


def test_an_uncalibrated_model_does_not_answer_and_is_not_saved(tmp_path):
    captured = CapturedModel(capture(timm_vit(), photos(2)), (3, 64, 64))
    model = QuantizedModel(captured, load_recipe("minmax"), Bits())
    with pytest.raises(CalibrationError, match="patch_embed:input is not calibrated"):
        model(photos(2))
    with pytest.raises(CalibrationError, match="not calibrated"):
        model.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_image_size_is_refused():
    quantized = vitquant.quantize(timm_vit(), "minmax", [photos()])
    with pytest.raises(CaptureError, match="images of 3x64x64, these are 3x32x32"):
        quantized(photos(2, size=32))
    with pytest.raises(CaptureError, match="3x32x32"):
        vitquant.quantize(timm_vit(), "minmax", [photos(), photos(size=32)])


def test_bad_values_are_named_by_site():
    broken = photos()
    broken[2, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"^calibrate at patch_embed:input: NaN or infinity"):
        vitquant.quantize(timm_vit(), "minmax", [photos(), broken])
    model = timm_vit()
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"blocks\.1\.attn\.proj\.weight holds NaN or infinity"):
        vitquant.quantize(model, "minmax", [photos()])


def test_activations_that_overflow_are_named_by_site():
    model = timm_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.fill_(1e30)
        model.blocks[1].mlp.fc2.weight.fill_(1e30)
    with pytest.raises(CalibrationError) as refused:
        vitquant.quantize(model, "minmax", [photos()])
    assert str(refused.value) == "calibrate at blocks.1.residual2:rhs: NaN or infinity in the calibration data"


def test_no_data_is_refused():
    for data in ([], [torch.empty(0, 3, 64, 64)], [torch.zeros(2, 3)], ["image.png"]):
        with pytest.raises(CalibrationError):
            vitquant.quantize(timm_vit(), "minmax", data)


def test_a_model_without_attention_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.Flatten(), nn.Linear(128, 7))
    with pytest.raises(CaptureError, match="no attention"):
        vitquant.quantize(model, "minmax", [photos()])


@pytest.mark.parametrize("rule", ["activations", "weights"])
@pytest.mark.parametrize("observer", ["minmax", "omse", "best-percentile"])
def test_a_scale_for_each_head_of_what_has_no_heads_is_refused(rule, observer):
    settings = [f"{rule}.per=head", f"{rule}.observer={observer}"]
    with pytest.raises(RecipeError, match=rf"{rule}.*per = .head. needs attention's heads as third axis .* this is \("):
        vitquant.quantize(timm_vit(), "minmax", [torch.randn(2, 3, 64, 64)], settings=settings)


def test_unknown_methods_and_settings_are_refused_before_any_work():
    recipe = load_recipe("minmax")
    from dataclasses import replace

    from vitquant.recipe import Method

    with pytest.raises(RecipeError, match="'distil' is unknown"):
        vitquant.quantize(timm_vit(), replace(recipe, methods=(Method("distil"),)), [photos()])
    with pytest.raises(RecipeError, match=r"calibrate.*momentum"):
        vitquant.quantize(timm_vit(), "minmax", [photos()], settings=["calibrate.momentum=0.1"])


@pytest.fixture
def saved(tmp_path):
    vitquant.quantize(timm_vit(), "minmax", [photos()]).save(tmp_path / "out")
    return tmp_path / "out"


def rewrite(saved, change):
    """Alter a saved model as somebody would who repairs the digests afterwards."""
    from vitquant.model.checkpoint import read_checkpoint, write_checkpoint

    tensors, config = read_checkpoint(saved)
    change(tensors, config)
    config = {key: value for key, value in config.items() if key not in ("format", "files")}
    write_checkpoint(saved, tensors, config, force=True)


def test_a_saved_model_without_scales_is_refused(saved):
    key = "quantizers.blocks.0.attn.scores:query.scale"
    rewrite(saved, lambda tensors, _: tensors.pop(key))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.scores:query\.scale is missing"):
        vitquant.load(saved, model=timm_vit())


def test_a_saved_model_with_scales_that_cannot_be_is_refused(saved):
    key = "quantizers.blocks.0.attn.scores:query.scale"
    for value in (float("nan"), 0.0, -1.0):
        rewrite(saved, lambda tensors, _, value=value: tensors.update({key: torch.tensor(value)}))
        with pytest.raises(CheckpointError, match=r"scores:query"):
            vitquant.load(saved, model=timm_vit())


def test_a_saved_model_of_other_shapes_is_refused(saved):
    rewrite(saved, lambda tensors, _: tensors.update({"blocks.0.attn.qkv.bias": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv\.bias"):
        vitquant.load(saved, model=timm_vit())


def test_another_model_or_a_changed_graph_is_refused(saved):
    for other in (timm_vit(depth=1), timm_vit(num_heads=4), timm_vit(act_layer=nn.ReLU), timm_vit(num_classes=8)):
        with pytest.raises(CheckpointError, match="graph is not the one that was saved"):
            vitquant.load(saved, model=other)


def test_a_saved_model_without_source_says_what_to_do(saved):
    with pytest.raises(CheckpointError, match=r"load\(.*model="):
        vitquant.load(saved)


def test_a_factory_named_in_a_file_is_not_imported(saved):
    rewrite(saved, lambda _, config: config.update(source={"name": "python:os.path:join"}))
    with pytest.raises(CheckpointError, match=r"python:os\.path:join.*repeat it"):
        vitquant.load(saved)


def test_the_record_tells_what_calibration_saw(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["records"][0]["summary"] == {"images": 6, "batches": 1}
    decision = config["records"][0]["decisions"]["patch_embed:input"]
    assert decision == {"low": photos().min().item(), "high": photos().max().item()}
    assert config["calibration"]["images"] == 6
    assert config["quantization_config"]["quant_method"] == "vitquant"


def test_what_a_model_s_code_computes_anew_is_saved_with_it(tmp_path):
    """Sines of positions, which another processor rounds apart; here by far."""
    import timm

    sizes = {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 28, "num_classes": 5}
    model, other = (timm.create_model("eva02_tiny_patch14_224", **sizes).eval() for _ in range(2))
    x = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    quantized = vitquant.quantize(model, "minmax", [x])
    assert "rope.pos_embed" not in model.state_dict()
    quantized.save(tmp_path / "out")
    other.rope.pos_embed += 0.1
    loaded = vitquant.load(tmp_path / "out", other)
    assert torch.equal(loaded(x), quantized(x))
    assert digest(loaded) == digest(quantized)

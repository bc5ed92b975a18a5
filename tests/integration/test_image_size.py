"""Models at another image size have the same scales, and are what quantizing there with these scales gives."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image
from safetensors.torch import save_file

import vitquant
from vitquant.errors import CaptureError
from vitquant.graph.outputs import named_tensors
from vitquant.model.saved import digest
from vitquant.tasks.preprocessing import Preprocessing

SIZE, OTHER = 64, (96, 80)
TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "num_labels": 7}
TINY |= {"image_size": SIZE, "patch_size": 16}
VIT = {"img_size": SIZE, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
SWIN = {"img_size": SIZE, "window_size": 4, "depths": (2, 2), "embed_dim": 24, "num_heads": (1, 2), "num_classes": 7}


def vit(**given):
    return timm.create_model("vit_tiny_patch16_224", **{**VIT, **given})


MODELS = {
    "timm vit": (lambda: vit(dynamic_img_size=True), OTHER),
    "timm vit maps": (lambda: vit(dynamic_img_size=True, num_classes=0, global_pool=""), OTHER),
    "timm swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224", **SWIN, strict_img_size=False), (96, 128)),
    "torchvision swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [1, 2], [4, 4], num_classes=7),
        (96, 128),
    ),
    "dinov2": (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**TINY)), OTHER),
    "pvt": (lambda: timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), num_classes=7), (96, 128)),
}


def images(height, width, count=4, seed=0):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def quantized_by(model, recipe, **given):
    return vitquant.quantize(model, recipe, [images(SIZE, SIZE)], **given)


def outputs(model, x):
    with torch.no_grad():
        return list(named_tensors(model(x)).values())


@pytest.fixture(scope="module", params=MODELS)
def family(request):
    create, other = MODELS[request.param]
    torch.manual_seed(0)
    model = create().eval()
    for parameter in model.parameters():  # some are zero at first
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else None
    return model, other


@pytest.mark.parametrize("recipe", ["fq-vit", "default", "repq-vit+reconstructed-output+fully-integer"])
def test_weights_and_scales_stay_and_the_program_is_the_simulation(family, recipe):
    model, other = family
    settings = ["reconstruct-output.steps=2"] if "reconstructed" in recipe else []
    quantized = quantized_by(model, recipe, settings=settings)
    before = digest(quantized)
    there = vitquant.at_image_size(quantized, model, other)
    assert digest(quantized) == before
    assert there.input_shape == (3, *other)
    state, expected = (each.graph_module.state_dict() for each in (there, quantized))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], each) for name, each in expected.items())
    assert [record.method for record in there.records] == [record.method for record in quantized.records]
    x = images(*other, seed=1)
    report = vitquant.compare(there, [x])
    assert not report.refused
    assert report.broken == []
    back = vitquant.at_image_size(there, model, SIZE)
    assert digest(back) == before
    pairs = zip(outputs(back, images(SIZE, SIZE)), outputs(quantized, images(SIZE, SIZE)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_it_is_what_a_capture_there_is_with_these_quantizers(family):
    model, other = family
    quantized = quantized_by(model, "minmax")
    there = vitquant.at_image_size(quantized, model, other)
    by_hand = vitquant.quantize(model, "minmax", [images(*other)])
    by_hand.insert(quantized.quantizers)
    x = images(*other, seed=1)
    assert all(torch.equal(*pair) for pair in zip(outputs(there, x), outputs(by_hand, x), strict=True))
    with torch.no_grad():
        floats = named_tensors(there.run(x, {}, quantized=False)).values()
        expected = named_tensors(model(x)).values()
    for found, exact in zip(floats, expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)


def test_it_is_saved_and_loaded_at_its_size(tmp_path):
    torch.manual_seed(0)
    save_file(vit().state_dict(), tmp_path / "weights.safetensors")
    weights = str(tmp_path / "weights.safetensors")
    fixed = vitquant.ModelSource("timm:vit_tiny_patch16_224", VIT, weights)
    quantized = quantized_by(
        vitquant.zoo.create(fixed), "fq-vit", source=fixed, preprocessing=Preprocessing((3, SIZE, SIZE)).to_dict()
    )
    free = vitquant.ModelSource("timm:vit_tiny_patch16_224", {**VIT, "dynamic_img_size": True}, weights)
    there = vitquant.at_image_size(quantized, vitquant.zoo.create(free), OTHER, free)
    there.save(tmp_path / "out")
    loaded = vitquant.load(tmp_path / "out")
    farther = vitquant.at_image_size(loaded, vitquant.zoo.create(free), 80)
    assert "input_shape" not in quantized.provenance["calibration"]
    for each in (loaded, farther):
        assert each.provenance["calibration"]["input_shape"] == [3, SIZE, SIZE]  # where the scales come from
    assert loaded.input_shape == (3, *OTHER)
    assert loaded.provenance["preprocessing"]["input_size"] == [3, *OTHER]
    assert loaded.provenance["preprocessing"]["crop_pct"] == quantized.provenance["preprocessing"]["crop_pct"]
    x = images(*OTHER)
    assert all(torch.equal(*pair) for pair in zip(outputs(loaded, x), outputs(there, x), strict=True))


def test_tables_of_indices_are_those_of_the_new_size():
    """Of the same shape at both sizes, and with other numbers."""

    class Ordered(torch.nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.vit = vit(dynamic_img_size=True)
            self.register_buffer("order", torch.arange(8).view(rows, -1).T.flatten())

        def forward(self, images):
            return self.vit.forward_features(images)[:, 1:][:, self.order]

    torch.manual_seed(0)
    wide, tall = Ordered(2).eval(), Ordered(4).eval()
    tall.vit.load_state_dict(wide.vit.state_dict())
    quantized = vitquant.quantize(wide, "minmax", [images(32, 64)])
    there = vitquant.at_image_size(quantized, tall, (64, 32))
    assert torch.equal(there.graph_module.order, tall.order)
    x = images(64, 32)
    with torch.no_grad():
        torch.testing.assert_close(there.run(x, {}, quantized=False), tall(x), rtol=1e-3, atol=1e-4)


def test_zeros_beside_what_a_method_shifted_are_refused():
    """At 64 pixels the windows of this Swin are filled; at 72 they are padded behind the norm that RepQ-ViT shifts."""
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN, strict_img_size=False).eval()
    shifted = quantized_by(model, "repq-vit", simulated=True)
    with pytest.raises(CaptureError, match=r"at 72 x 72 pixels zeros are put beside the result of blocks.*shifted"):
        vitquant.at_image_size(shifted, model, 72)
    there = vitquant.at_image_size(quantized_by(model, "minmax"), model, 72)
    found, expected = outputs(there, images(72, 72))[0], outputs(model, images(72, 72))[0]
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.98


def test_the_command_line_writes_it_and_evaluates_it(run, tmp_path):
    torch.manual_seed(0)
    for number in range(4):
        pixels = torch.randint(0, 256, (120, 120, 3), dtype=torch.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{number}.png")
    save_file(vit(num_classes=0).state_dict(), tmp_path / "weights.safetensors")
    words = [f"--model-arg={key}={value}" for key, value in {**VIT, "num_classes": 0}.items()]
    words += ["--weights", tmp_path / "weights.safetensors", "--calibration", tmp_path / "images", "--recipe", "fq-vit"]
    out, there = tmp_path / "out", tmp_path / "there"
    assert run("quantize", "timm:vit_tiny_patch16_224", *words, "--output", out)[0] == 0
    code, _, err = run("resize", out, "--image-size", "96x80", "--output", there)
    assert (code, err.count("\n")) == (2, 1)
    assert "refuses an input of shape" in err
    assert not there.exists()
    words = ["--image-size", "96x80", "--output", there, "--model-arg", "dynamic_img_size=True"]
    code, text, err = run("resize", out, *words, "--json")
    assert (code, err) == (0, "")
    assert json.loads(text)["input_shape"] == [3, 96, 80]
    code, text, err = run("evaluate", there, "--data", tmp_path / "images", "--json")
    assert err == ""
    values = json.loads(text)
    assert (code, values["engine"], values["images"]) == (0, "integer", 4)
    assert values["outputs"][0]["cosine"] > 0.9
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "source": ["timm"]}))
    code, _, err = run("resize", out, *words)
    assert (code, err.count("\n")) == (2, 1)
    (out / "config.json").write_text(json.dumps(config))
    for size in ("0", "96x", "x96", "96x80x3", "-1", "1e2", "\u0661"):
        code, _, err = run("resize", out, f"--image-size={size}", "--output", tmp_path / "other")
        assert (code, err.count("\n")) == (2, 1), size


@pytest.mark.parametrize(
    ("create", "size", "problem"),
    [
        (lambda: vit(), 96, "refuses an input of shape"),
        (lambda: vit(img_size=96), 96, r"at 96 x 96 pixels: pos_embed has another shape.*dynamic_img_size=True"),
        (lambda: vit(dynamic_img_size=True, depth=1), 96, r"another computation: it has not blocks\.1\."),
        (
            lambda: vit(dynamic_img_size=True, num_classes=5),
            96,
            r"head:weight has a scale of .*\(7,\), not float32 \(\) or \(5,\); give a model",
        ),
        (lambda: vit(dynamic_img_size=True), 90, "refuses an input of shape"),
        (lambda: vit(dynamic_img_size=True), 0, "no image has the size 0"),
        (lambda: vit(dynamic_img_size=True), (96, -16), r"no image has the size \(96, -16\)"),
        (lambda: vit(dynamic_img_size=True), (3, 96, 96), "no image has the size"),
        (lambda: vit(dynamic_img_size=True), (96.0, 96), "no image has the size"),
        (lambda: vit(dynamic_img_size=True), 96.0, "no image has the size"),
        (lambda: vit(dynamic_img_size=True), True, "no image has the size"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(create, size, problem):
    torch.manual_seed(0)
    quantized = quantized_by(vit(dynamic_img_size=True).eval(), "minmax")
    with pytest.raises(CaptureError, match=problem) as refused:
        vitquant.at_image_size(quantized, create().eval(), size)
    assert "\n" not in str(refused.value)

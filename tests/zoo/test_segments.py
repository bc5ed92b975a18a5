"""Parts of captured models that run by themselves: bit for bit what they give in place, with gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from architectures import ZOO, vary

import vitquant
from vitquant.errors import CaptureError
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel

NAMES = ["timm deit", "timm swin", "transformers vit"]
PARTS = {"block": "blocks.1.", "attention": "blocks.1.attn.", "mlp": "blocks.1.mlp."}


def given(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    build, size = ZOO[name]
    torch.manual_seed(0)
    model = build().eval()
    vary(model)
    return model, torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=NAMES)
def captured(request):
    model, images = given(request.param)
    return CapturedModel(capture(model, images), tuple(images.shape[1:])), images


@pytest.fixture(scope="module", params=[(name, recipe) for name in NAMES for recipe in ("minmax", "fq-vit")])
def quantized(request):
    model, images = given(request.param[0])
    return vitquant.quantize(model, request.param[1], [images]), images


def several(x):
    return x if isinstance(x, tuple) else (x,)


def logits(x):
    return getattr(x, "logits", x)


def sites_of(model, prefix):
    return [site for site in model.sites if site.name.startswith(prefix)]


def check_parts(model, images, prefix):
    """A part alone, fed by what stands before it, gives what it gives in the model."""
    inputs, outputs = model.boundary(sites_of(model, prefix))
    through = sorted({*inputs, *outputs})  # what goes around the part
    with torch.no_grad():
        before = dict(zip(inputs, model.segment("images", inputs)(images), strict=True))
        found = dict(zip(outputs, model.segment(inputs, outputs)(*before.values()), strict=True))
        in_place = dict(zip(through, model.segment("images", through)(images), strict=True))
        for name, x in (before | found).items():
            assert torch.equal(x, in_place[name]), name
        return inputs, outputs, before, found


@pytest.mark.parametrize("part", PARTS)
def test_a_part_gives_what_it_gives_in_place(captured, part):
    check_parts(*captured, PARTS[part])


@pytest.mark.parametrize("part", PARTS)
def test_a_quantized_part_gives_what_it_gives_in_place(quantized, part):
    check_parts(*quantized, PARTS[part])


def test_before_block_and_behind_are_the_model(quantized):
    model, images = quantized
    with torch.no_grad():
        for sites in model.index.blocks.values():
            inputs, outputs = model.boundary(sites)
            assert len(inputs) == len(outputs) == 1
            stream = model.segment("images", inputs[0])(images)
            stream = model.segment(inputs, outputs[0])(stream)
            assert torch.equal(model.segment(outputs, "output")(stream), logits(model(images)))


def test_any_number_of_images_goes_through_a_part(captured):
    model, images = captured
    inputs, outputs = model.boundary(sites_of(model, "blocks.1."))
    block, before = model.segment(inputs, outputs[0]), model.segment("images", inputs[0])
    with torch.no_grad():
        for count in (1, 2, 5):
            some = images[:1].repeat(count, 1, 1, 1)
            assert torch.equal(block(before(some)), model.segment("images", outputs[0])(some))


def test_gradients_reach_inputs_weights_and_scales(quantized):
    model, images = copy.deepcopy(quantized[0]), quantized[1]
    inputs, outputs = model.boundary(model.index.blocks[1])
    block = model.segment(inputs, outputs[0])
    names = {name for name, _ in model.graph_module.named_parameters() if name.startswith(module_of(model, 1))}
    assert {name for name, _ in block.named_parameters()} == names
    learned = next(each for each in block.modules() if isinstance(each, vitquant.quantizers.Quantizer))
    learned.scale.requires_grad_(True)
    with torch.no_grad():
        stream = model.segment("images", inputs[0])(images)
    stream.requires_grad_(True)
    block(stream).square().sum().backward()
    assert stream.grad is not None
    assert stream.grad.abs().sum() > 0
    for name, parameter in block.named_parameters():
        assert parameter is model.graph_module.get_parameter(name)  # whoever trains the part trains the model
        assert parameter.grad is not None, name
    assert learned.scale.grad is not None


def module_of(model, block):
    weights = [site.module for site in model.index.blocks[block] if "weight" in site.operands]
    common = weights[0]
    while not all(each.startswith(common) for each in weights):
        common = common.rpartition(".")[0]
    return common + "."


def test_parts_of_the_float_model_and_of_the_quantized_one_have_the_same_names(quantized):
    model, images = quantized
    inputs, outputs = model.boundary(model.index.blocks[0])
    with torch.no_grad():
        x = model.segment("images", inputs[0], quantized=False)(images)
        found = model.segment(inputs, outputs[0], quantized=False)(x)
        assert torch.equal(found, model.segment("images", outputs[0], quantized=False)(images))
        assert not torch.equal(found, model.segment(inputs, outputs[0])(x))


def test_what_a_site_reads_is_behind_its_quantizer(quantized):
    model, images = quantized
    name = "blocks.0.mlp.fc1:input"
    with torch.no_grad():
        norm, read = model.segment("images", ["blocks.0.norm2", name])(images)
        if name in model.quantizers:
            assert torch.equal(model.quantizers[name](norm), read)
            assert torch.equal(model.segment("images", name, quantized=False)(images), floats(model, images))
        head = model.segment(name, "blocks.0.mlp.fc1")(read)
        assert torch.equal(head, model.segment("images", "blocks.0.mlp.fc1")(images))


def floats(model, images):
    held = []
    model.run(images, {"blocks.0.mlp.fc1:input": lambda x: held.append(x.clone())}, quantized=False)
    return held[0]


def test_a_part_copies_and_pickles(captured):
    model, images = captured
    part = model.segment("images", "blocks.0.norm1")
    with torch.no_grad():
        expected = part(images)
        for other in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
            assert torch.equal(other(images), expected)


@pytest.mark.parametrize(
    ("inputs", "outputs", "said"),
    [
        ("blocks.0.norm2", "output", "do not separate the graph: blocks.0.residual2 also reads blocks.0.residual1"),
        ("blocks.1.norm1", "blocks.0.norm1", "blocks.0.norm1 is not computed from blocks.1.norm1"),
        (["images", "blocks.0.norm1"], "patch_embed", "blocks.0.norm1 is not read on the way to patch_embed"),
        ("blocks.0.nrm", "output", "no tensor 'blocks.0.nrm'; give images, SITE or SITE:OPERAND (sites: blocks.0"),
        ("images", "blocks.0.norm1:query", "no tensor 'blocks.0.norm1:query'"),
        ("%nothing", "output", "no tensor '%nothing'"),
        ("", "output", "no tensor ''"),
        (["images", "images"], "blocks.0.norm1", "images, images: two of these are one tensor"),
        ("images", [], "a segment has inputs and outputs"),
        ([], "output", "a segment has inputs and outputs"),
    ],
)
def test_what_is_no_part_is_refused_in_one_line(inputs, outputs, said):
    model, images = given("timm deit")
    captured = CapturedModel(capture(model, images), tuple(images.shape[1:]))
    with pytest.raises(CaptureError) as error:
        captured.segment(inputs, outputs)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_another_number_of_tensors_is_refused(captured):
    model, images = captured
    with pytest.raises(CaptureError, match="takes 1 tensors, images"):
        model.segment("images", "blocks.0.norm1")(images, images)

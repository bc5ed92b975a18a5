"""Every architecture of the zoo lowers to a program that is its simulation, or is refused for a right reason."""

import pytest
import torch
from architectures import CLASSES, ZOO, vary
from torch import nn

import vitquant
from vitquant.errors import LoweringError
from vitquant.lowering import lower
from vitquant.model.simulation import ExactSimulation
from vitquant.runtime.interpreter import Interpreter

REFUSED = {
    "timm cait": r"blocks\.0\.attn.*only a softmax gives powers of two; quantize it uniformly",  # talking heads
    "timm xcit": r"blocks\.0\.attn.*linalg_vector_norm has no integer form",  # normalizes query and key
    "timm swinv2": r"blocks\.0\.attn.*linalg_vector_norm has no integer form",
    "timm tiny_vit": r"blocks\.0\.norm1: it stays in float: its input's scales are those of other channels",
    "timm mvitv2": r"blocks\.0\.attn.*it rearranges a sum in which a part is repeated",  # bias by row and column
    "timm crossvit": r"upsample_bicubic2d has no integer form",  # resizes the image
    "transformers dinov2": r"norm: it stays in float: its result is read in float",
}


class Logits(nn.Module):
    """A classifier that gives its logits only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        output = self.model(images)
        if isinstance(output, dict | tuple):
            return output["logits"] if isinstance(output, dict) else output[0]
        return output


def quantized(name, recipe="fq-vit", simulated=False):
    build, size = ZOO[name]
    torch.manual_seed(0)
    model = build().eval()
    vary(model)
    batches = [torch.randn(4, 3, size, size) for _ in range(2)]
    return vitquant.quantize(Logits(model), recipe, batches, simulated=simulated), size


@pytest.mark.parametrize("name", sorted(ZOO.keys() - REFUSED.keys()))
def test_the_program_gives_the_codes_of_the_simulation(name):
    model, size = quantized(name)
    program, images = lower(model), torch.randn(6, 3, size, size)
    with torch.inference_mode():
        codes = Interpreter(program)(model.image_quantizer.encode(images))
        simulated = model.quantizers[final(model)].encode(ExactSimulation(model)(images))
    assert torch.equal(codes, simulated.to(torch.int64))
    assert codes.unique().numel() >= CLASSES  # not one constant


def final(model):
    """The name of the value that the logits are."""
    (node,) = next(each for each in model.graph_module.graph.nodes if each.op == "output").all_input_nodes
    return str(node.target).removeprefix("quantizers.")


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused_is_refused_for_what_it_is(name):
    with pytest.raises(LoweringError, match=r"fq-vit promises integers; .*--simulated") as early:
        quantized(name)
    with pytest.raises(LoweringError, match=REFUSED[name]) as late:
        lower(quantized(name, simulated=True)[0])
    # What is said before calibration is what would have been said after it.
    assert str(early.value).startswith(late.value.problem)


def test_logits_and_attention_maps_are_outputs_of_one_program():
    build, size = ZOO["attention maps"]
    torch.manual_seed(0)
    model = vitquant.quantize(build().eval(), "fq-vit", [torch.randn(2, 3, size, size)])
    images = torch.randn(3, 3, size, size)
    found = lower(model).run(images)
    assert {name: each.shape[0] for name, each in found.items()} == {"logits": 3, "maps": 3}
    with torch.no_grad():
        expected = model(images)
    assert all(torch.cosine_similarity(found[name].flatten(), expected[name].flatten(), 0) > 0.99 for name in expected)


def test_talking_heads_lower_without_powers_of_two():
    model, size = quantized("timm cait", "fq-vit+uniform-probs")
    codes = Interpreter(lower(model))(model.image_quantizer.encode(torch.randn(2, 3, size, size)))
    assert codes.shape == (2, CLASSES)

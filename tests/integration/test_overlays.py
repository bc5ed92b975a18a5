"""The overlays that ship lie over every recipe, alone and in pairs, and a refusal names the order that works."""

import re
from itertools import permutations

import pytest
import timm
import torch
from architectures import Einsum

import vitquant
from vitquant.errors import RecipeError
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.model import QuantizedModel
from vitquant.recipe import load_recipe

RECIPES = ("fq-vit", "repq-vit", "vt-ptq", "minmax")
OVERLAYS = (
    "fully-integer", "wide-residual", "power-of-two-factor", "uniform-norm-inputs", "uniform-probs", "searched-scales",
    "twin-steps", "reconstructed-output", "adversarially-distilled",
)  # fmt: skip
TINY = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "num_classes": 5}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **TINY).eval()


@pytest.fixture(scope="module")
def captured(network):
    return capture(network, torch.randn(2, 3, 32, 32))


def assigned(captured, name):
    """The specs that a recipe with overlays gives."""
    recipe = load_recipe(name)
    return QuantizedModel(CapturedModel(captured, (3, 32, 32)), recipe, recipe.bits).assignments


def refusal(captured, name):
    """Why overlays do not compose; empty when they do."""
    try:
        assigned(captured, name)
    except RecipeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("recipe", RECIPES)
def test_pairs_of_overlays_compose_in_one_order_at_least(captured, recipe):
    refused = 0
    for first, second in permutations(OVERLAYS, 2):
        reason = refusal(captured, f"{recipe}+{first}+{second}")
        if reason:
            refused += 1
            advice = re.search(r"write the overlays in the other order: (\S+)", reason)
            assert advice is not None, reason
            assert advice[1] == f"+{second}+{first}"
            assert assigned(captured, recipe + advice[1])
    assert refused < len(OVERLAYS)  # most orders work


def test_what_a_later_overlay_sets_is_what_the_values_get(captured):
    wide = assigned(captured, "repq-vit+fully-integer+wide-residual")
    stream = [each.spec.bits for name, each in wide.items() if name.endswith(("norm1:input", "norm2:input"))]
    assert stream == [16] * 4
    narrow = assigned(captured, "repq-vit+fully-integer+wide-residual+uniform-norm-inputs")
    assert [each.spec.bits for name, each in narrow.items() if name.endswith(("norm1:input", "norm2:input"))] == [8] * 4
    assert {each.spec.bits for name, each in wide.items() if name.endswith(("fc1:input", "fc2:weight"))} == {4}


def test_methods_run_in_their_order_whichever_overlay_comes_first(network):
    images = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))]
    quick = ["search-scales.rounds=1", "search-scales.candidates=3"]
    names = ("repq-vit+searched-scales+fully-integer", "repq-vit+fully-integer+searched-scales")
    one, other = (vitquant.quantize(network, name, images, bits="w8a8s5", settings=quick) for name in names)
    methods = [record.method for record in one.records]
    assert methods == [record.method for record in other.records]
    assert methods.index("search-scales") < methods.index("integer-operations")
    with torch.no_grad():
        assert torch.equal(one(images[0]), other(images[0]))


def test_a_wide_stream_needs_no_norm_to_read_it():
    recipe = load_recipe("minmax+wide-residual")
    captured = CapturedModel(capture(Einsum().eval(), torch.randn(2, 3, 32, 32)), (3, 32, 32))
    model = QuantizedModel(captured, recipe, recipe.bits)
    added = [value.name for value in model.values if {reader.kind for reader in value.readers} == {"residual"}]
    assert [model.assignments[name].spec.bits for name in added] == [16]  # the other operand is attention's input, too

"""A model's tensors are named in the order in which its captured graph gives them."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vitquant.errors import ModelError
from vitquant.graph.capture import capture
from vitquant.graph.captured import CapturedModel
from vitquant.graph.outputs import named_tensors, output_names

Pair = namedtuple("Pair", "left right")
KEYS = st.text("abcd_", min_size=1, max_size=4)


class Gives(nn.Module):
    """Gives what a function makes of its product."""

    def __init__(self, made):
        super().__init__()
        self.linear, self.made = nn.Linear(4, 4), made

    def forward(self, x):
        return self.made(self.linear(x))


def trees(leaves):
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
    )


@given(trees(st.integers(0, 5)))
def test_every_name_is_the_way_to_its_tensor(tree):
    def tensors(part):
        if isinstance(part, dict):
            return {key: tensors(each) for key, each in part.items()}
        return [tensors(each) for each in part] if isinstance(part, list) else torch.tensor(float(part))

    found = named_tensors(tensors(tree))
    for name, tensor in found.items():
        here = tree
        for key in () if name == "output" and not isinstance(tree, dict | list) else name.split("."):
            here = here[int(key)] if isinstance(here, list) else here[key]
        assert here == tensor.item()
    flat = str(tree)
    assert len(found) == sum(flat.count(f"{digit}") for digit in range(6))


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (lambda x: x, ["output"]),
        (lambda x: (x,), ["0"]),
        (lambda x: [x, (x + 1, x * 2)], ["0", "1.0", "1.1"]),
        (lambda x: {"b": x, "a": [x + 1]}, ["b", "a.0"]),
        (lambda x: Pair(x, x + 1), ["left", "right"]),
        (lambda x: OrderedDict(z=x, y=x + 2), ["z", "y"]),
        (lambda x: (x, None, x > 0, x.argmax(-1)), ["0"]),
        (lambda x: {"a.b": x, "a": {"b": x + 1}}, ["0", "1"]),  # one way would lead to both
        (lambda x: {"a:b": x, "c": x + 1}, ["0", "1"]),
        (lambda x: {"a": x, "b": x}, ["a", "b"]),  # one tensor, given twice
    ],
)
def test_a_captured_model_gives_the_tensors_of_its_names(made, names):
    model, images = Gives(made).eval(), torch.randn(3, 3, 4, 4)
    captured = CapturedModel(capture(model, images[:2]), (3, 4, 4))
    assert list(captured.outputs) == names
    assert list(named_tensors(model(images))) == names
    found = captured.named_outputs(captured(images))
    assert all(torch.equal(found[name], each) for name, each in named_tensors(model(images)).items())
    assert captured.outputs == {name: (-1, *each.shape[1:]) for name, each in found.items()}
    again = copy.deepcopy(captured)
    assert output_names(again.graph_module) == output_names(captured.graph_module)


def test_other_tensors_than_the_models_are_refused():
    captured = CapturedModel(capture(Gives(lambda x: x), torch.randn(2, 3, 4, 4)), (3, 4, 4))
    with pytest.raises(ModelError, match="there are 2 float tensors in an output, and not 1"):
        captured.named_outputs((torch.zeros(1), torch.zeros(1)))

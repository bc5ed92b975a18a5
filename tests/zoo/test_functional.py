"""The functional form of an export: what tracing again would give, and traced again only where it has to be."""

from __future__ import annotations

import pytest
import torch
from architectures import ZOO
from torch import nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule

from vitquant.graph.capture import capture
from vitquant.graph.operators import aten, calls

PLAIN = ["timm deit", "timm swin", "transformers vit", "torchvision vit", "encoder post-norm relu"]


def captured(name: str) -> GraphModule:
    make, size = ZOO[name]
    torch.manual_seed(0)
    return capture(make(), torch.zeros(2, 3, size, size))


def written(module: GraphModule) -> list[tuple[object, ...]]:
    """Every node with its arguments, by position, and its metadata."""
    places = {node: place for place, node in enumerate(module.graph.nodes)}

    def place(value: object) -> object:
        if isinstance(value, list | tuple):
            return [place(each) for each in value]
        return f"node {places[value]}" if value in places else value

    return [(node.op, str(node.target), place(node.args), node.kwargs, node.meta) for node in module.graph.nodes]


@pytest.mark.parametrize("name", ZOO)
def test_the_graph_is_that_of_a_program_that_is_traced_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = captured(name)
    monkeypatch.setattr("vitquant.graph.capture.functional", lambda program: program.run_decompositions({}))
    assert written(found) == written(captured(name))


@pytest.mark.parametrize("name", PLAIN)
def test_models_that_overwrite_nothing_are_traced_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def traced_again(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(ExportedProgram, "run_decompositions", traced_again)
    captured(name)


class Overwriting(nn.Module):
    """Writes into a part of what it reads again, by an operator whose result nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        doubled = images * 2
        doubled[:, 0].mul_(3)
        return self.head(doubled.reshape(images.shape[0], -1))


def test_no_operator_overwrites_anything() -> None:
    torch.manual_seed(0)
    model, images = Overwriting().eval(), torch.randn(4, 3, 2, 2)
    found = capture(model, images)
    called = [node.target for node in found.graph.nodes if isinstance(node.target, OpOverload)]
    assert aten.mul.Tensor in called
    assert not any(each._schema.is_mutable for each in called)
    assert torch.equal(found(images), model(images))


class Dropping(nn.Module):
    """A dropout of nothing that is always in training mode, as `F.dropout(x, 0.0)` is by default."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(nn.functional.dropout(images.reshape(images.shape[0], -1), 0.0))


def test_a_dropout_of_nothing_leaves_nothing() -> None:
    found = capture(Dropping(), torch.randn(4, 3, 2, 2))
    assert not [node for node in found.graph.nodes if calls(node, {aten.dropout})]

"""One layer of a model with its operands in float, and the scores of candidates for their quantizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from vitquant.graph.kinds import kinds_that
from vitquant.graph.operators import arguments, aten, calls
from vitquant.graph.sites import Site
from vitquant.graph.stored import stored, times_read, unquantized
from vitquant.graph.walk import nodes_by_name
from vitquant.model import QuantizedModel
from vitquant.objectives.correlation import LinearOutput
from vitquant.objectives.product_output import ProductOutput, Ranking
from vitquant.quantizers import Quantizer

LAYERS = kinds_that(layer=True)
PRODUCTS = kinds_that(of_attention=True)


class SearchedLayer:
    """A linear layer, or a convolution as a linear layer of its patches.

    Arguments:
        x: float (images, tokens, inputs).
        weight: as stored, outputs first.
        bias: (outputs,), or None.
        correctable: the stored bias if bias correction may change it, else None.
        values: the names of the input's and the weight's value.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, correctable: Tensor | None, values: tuple[str, ...]
    ) -> None:
        self.values = values
        self._output = LinearOutput(x, weight, bias)
        self._stored, self._bias = correctable, self._output.bias

    def scores(self, name: str, candidates: Sequence[Quantizer], fixed: Mapping[str, Quantizer]) -> Tensor:
        source, weight = (fixed[each] for each in self.values)
        if name == self.values[0]:
            return self._output.of_inputs(candidates, weight, self._bias)
        return self._output.of_weights(source, candidates, self._bias)

    def correct(self, chosen: Mapping[str, Quantizer]) -> None:
        if self._stored is not None:
            source, weight = (chosen[each] for each in self.values)
            self._bias = self._output.corrected_bias(source, weight)

    @property
    def correctable(self) -> bool:
        """Whether it has a bias that may change."""
        return self._stored is not None

    @property
    def corrected(self) -> tuple[Tensor, Tensor] | None:
        """The stored bias and its corrected value; None where it stays as it is."""
        return None if self._stored is None or self._bias is self._output.bias else (self._stored, self._bias)


class SearchedProduct:
    """A product of two activations.

    Arguments:
        output: the output of the product.
        values: the names of its operands' values.
    """

    def __init__(self, output: ProductOutput, values: tuple[str, ...]) -> None:
        self.values, self._output = values, output

    def scores(self, name: str, candidates: Sequence[Quantizer], fixed: Mapping[str, Quantizer]) -> Tensor:
        left, right = (fixed[each] for each in self.values)
        if name == self.values[0]:
            return self._output.of_operands(candidates, [right])
        return self._output.of_operands([left], candidates)

    correctable = False

    def correct(self, chosen: Mapping[str, Quantizer]) -> None:
        """Do nothing: a product has no bias."""

    @property
    def corrected(self) -> None:
        """It has no bias."""


def searched(
    model: QuantizedModel, site: Site, held: Mapping[str, Tensor], ranking: Ranking
) -> SearchedLayer | SearchedProduct:
    """A site with its operands in float.

    Arguments:
        held: the operands in float except the weight, by `site:operand`: (images, ..., rows, columns) or, for
            convolutions, (images, parts, channels, height, width).
        ranking: the settings of the ranking loss of attention maps.
    """
    node, module = node_of(model, site), model.graph_module
    read = model.index.read_by(site)
    values = tuple(value.name for value in read.values())
    if site.kind in PRODUCTS:
        left, right = (held[str(site.reader(operand))] for operand in site.operands)
        if unquantized(arguments(node)[0]).name != next(iter(site.operands.values())):
            left, right = left.mT, right.mT  # the model computes value^T probs^T
        return SearchedProduct(
            ProductOutput(left, right, _factor(node) if site.kind == "scores" else None, ranking), values
        )
    x, weight = held[str(site.reader("input"))], model.parameter(read["weight"]).detach()
    if site.kind == "conv":
        stride, padding, dilation = (option(node, place, name, default) for place, name, default in OF_CONV)
        patches = functional.unfold(x.flatten(0, 1), weight.shape[2:], dilation, padding, stride).mT
        x = patches.unflatten(0, x.shape[:2])
    bias = stored(module, option(node, 2, "bias", None))
    correctable = bias if bias is not None and times_read(module)[id(bias)] == 1 else None
    used = None if bias is None else bias.detach().to(x.dtype)
    return SearchedLayer(x.flatten(1, -2), weight.to(x.dtype), used, correctable, values)


OF_CONV = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))


def option(node: Node, place: int, name: str, default: Any) -> Any:
    """An argument of an operator, by place or by name."""
    given = arguments(node)[place] if len(arguments(node)) > place else node.kwargs.get(name, default)
    return tuple(given) if isinstance(given, list | tuple) else given


def node_of(model: QuantizedModel, site: Site) -> Node:
    """The graph node of a site."""
    return nodes_by_name(model.graph_module.graph)[site.node]


def _factor(node: Node) -> float:
    """The factor by which the scores are multiplied before their softmax."""
    for user in node.users:
        if calls(user, {aten.mul}) and isinstance(arguments(user)[1], float):
            return arguments(user)[1]
    return 1.0

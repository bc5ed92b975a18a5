"""Bounds on the memory and time for building and running a model that a file describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from vitquant.errors import ModelError

_SPARE_ELEMENTS = 2**25  # for masks, tables of positions, and temporary tensors of initialization
_SPARE_CALLS = 2**13  # of torch's operators
_LARGEST = 32  # the most elements of one tensor in a forward pass, per element of the model; spare elements are added


# Swin V2 creates four times the elements of its parameters, and MaxViT calls 22 operators for each parameter; most
# models create no copies and call five.
class Budget(TorchDispatchMode):
    """A context in which torch creates no more tensors than building a model with given tensors needs.

    A file can ask for a million blocks, or for a layer of a billion channels; it is refused before this takes memory or
    time.

    Arguments:
        shapes: the shapes of the tensors in the file.

    Raises:
        ModelError: an operator would exceed the budget; raised before it runs.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self._elements = 8 * sum(map(prod, shapes.values())) + _SPARE_ELEMENTS
        self._calls = 32 * len(shapes) + _SPARE_CALLS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._calls -= 1
        self._elements -= _made_by(func, args, kwargs)
        if self._elements < 0 or self._calls < 0:
            raise ModelError("its source builds another, larger model than the one that was saved")
        return func(*args, **kwargs)


class ForwardBudget(TorchDispatchMode):
    """A context in which a forward pass creates no tensor that is far too large for a model with given tensors.

    A small file can ask for an image of millions of pixels, or for attention among millions of tokens. Two images of
    1,024 x 1,024 are within the budget for ViT-B and larger models, and two of 512 x 512 for ViT-Ti.

    Arguments:
        shapes: the shapes of the tensors in the file.

    Raises:
        ModelError: an operator would create a tensor that is too large; raised before it runs.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.largest = _LARGEST * sum(map(prod, shapes.values())) + _SPARE_ELEMENTS

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if max(_made_by(func, args, kwargs), _scores_of(func, args)) > self.largest:
            raise ModelError("it runs on images, or attends to tokens, that are far too many for a model of its size")
        return func(*args, **kwargs)


def _scores_of(func: Any, args: Any) -> int:
    """The number of scores of fused attention, which become a tensor once the model is captured; else 0."""
    if "scaled_dot_product" not in str(func) or len(args) < 2:
        return 0
    query, key = args[:2]
    return query.shape[:-1].numel() * key.shape[-2]


def _made_by(func: Any, args: Any, kwargs: Mapping[str, Any]) -> int:
    """The number of new elements that an operator creates, computed on the meta device."""
    schema = func._schema
    if any(result.alias_info is not None for result in schema.returns):  # a view or an in-place operator
        return 0
    args, keywords = tree_map_only(Tensor, lambda x: x.to("meta"), (args, dict(kwargs)))
    if any(argument.name == "device" for argument in schema.arguments):
        keywords["device"] = torch.device("meta")
    try:
        return sum(each.numel() for each in tree_iter(func(*args, **keywords)) if isinstance(each, Tensor))
    except (RuntimeError, NotImplementedError):  # its result depends on values, and is not larger than its input
        return 0

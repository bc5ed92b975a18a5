"""Bounds on what building a model and running it takes, for a model that a file describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from vitquant.errors import ModelError

_SPARE_ELEMENTS = 2**25  # masks, tables of positions, and what initialization makes on the way
_SPARE_CALLS = 2**13  # of torch's operators
_LARGEST = 32  # elements of one tensor in a forward pass, for each of the model's own; the spare ones come on top


# Swin V2 makes four times the elements of its parameters, and MaxViT calls 22 operators for each; most make no copy and
# call five.
class Budget(TorchDispatchMode):
    """Inside of this context torch makes no more tensors than a model with these ones needs.

    A file can ask for a million blocks, or for a layer of a billion channels; it is refused before memory or time goes.

    Arguments:
        shapes: of the tensors that a model of the file has.

    Raises:
        ModelError: from the operator that is one too many, before it runs.
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
    """Inside of this context no tensor is made that is far larger than a model with these ones makes of an image.

    A small file can ask for an image of millions of pixels, or for attention among as many tokens. Two images of
    1,024 x 1,024 are within it for ViT-B and larger models, of 512 x 512 for ViT-Ti.

    Arguments:
        shapes: of the tensors that a model of the file has.

    Raises:
        ModelError: from the operator that would make it, before it runs.
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
    """How many scores attention in one operator has: its parts make them once the model is captured."""
    if "scaled_dot_product" not in str(func) or len(args) < 2:
        return 0
    query, key = args[:2]
    return query.shape[:-1].numel() * key.shape[-2]


def _made_by(func: Any, args: Any, kwargs: Mapping[str, Any]) -> int:
    """How many new elements an operator makes, found without making them."""
    schema = func._schema
    if any(result.alias_info is not None for result in schema.returns):  # a view, or in place
        return 0
    args, keywords = tree_map_only(Tensor, lambda x: x.to("meta"), (args, dict(kwargs)))
    if any(argument.name == "device" for argument in schema.arguments):
        keywords["device"] = torch.device("meta")
    try:
        return sum(each.numel() for each in tree_iter(func(*args, **keywords)) if isinstance(each, Tensor))
    except (RuntimeError, NotImplementedError):  # it depends on values, and gives no more of them than it reads
        return 0

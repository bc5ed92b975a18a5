"""Real tensors represented as integers times real scales, the values of a quantized graph during lowering."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor
from torch.fx import Node


@dataclass(frozen=True)
class Term:
    """The tensor scale * (register - zero).

    Arguments:
        register: the name of the register.
        zero: int64, broadcastable to the register.
        scale: float64, broadcastable to the register.
        numerators: whether the register holds numerators of powers, which may have more than 8 bits in products.
    """

    register: str
    zero: Tensor
    scale: Tensor
    numerators: bool = False


@dataclass(frozen=True)
class Powers(Term):
    """The tensor scale * 2**(-register / steps), and 0 where the register equals `zero`.

    Rearrangements move the codes; arithmetic first turns them into sums of terms by `numerators`.

    Arguments:
        steps: the number of powers in an octave, 1 or 2.
    """

    steps: int = 1


@dataclass(frozen=True)
class Scaled:
    """The sum of some terms and a constant.

    Arguments:
        terms: all of one shape.
        constant: float64, broadcastable to that shape.
    """

    terms: tuple[Term, ...]
    constant: Tensor

    @property
    def single(self) -> Term | None:
        """The term of a value with exactly one term and no constant, else None."""
        return self.terms[0] if len(self.terms) == 1 and not bool(self.constant.any()) else None

    def times(self, factor: Tensor) -> Scaled:
        """The value times a constant that is broadcastable to its shape."""
        factor = factor.double()
        terms = tuple(replace(term, scale=term.scale * factor) for term in self.terms)
        return Scaled(terms, self.constant * factor)

    def plus(self, other: Scaled | Tensor) -> Scaled:
        """The value plus another of the same shape, or plus a broadcastable constant."""
        if isinstance(other, Tensor):
            return Scaled(self.terms, self.constant + other.double())
        return Scaled(self.terms + other.terms, self.constant + other.constant)


@dataclass(frozen=True)
class Static:
    """A tensor that does not depend on the images: float64."""

    value: Tensor


@dataclass(frozen=True)
class Joined:
    """A concatenation whose parts keep their own scales, until a quantizer reads it.

    Arguments:
        parts: in their order along the axis.
        axis: along which they are concatenated, counted from the first.
        node: the graph node, which has the shape of the whole.
    """

    parts: tuple[Scaled | Static, ...]
    axis: int
    node: Node


@dataclass(frozen=True)
class Masked:
    """Scores with a mask.

    Arguments:
        scores: before masking.
        mask: bool, broadcastable to the scores, True where masked.
        node: the graph node that applies the mask, which has the shape of the scores.
        moved: nodes that have rearranged the masked scores since. The mask repeats with the batch only in the shape in
            which it was applied, so the softmax is computed in that shape, and its result is rearranged.
        windows: the size of the batch axis for one image, such as its windows, where `mask` has this axis; else None.
    """

    scores: Scaled
    mask: Tensor
    node: Node
    moved: tuple[Node, ...] = ()
    windows: int | None = None


def numerators(powers: Powers) -> list[tuple[Tensor, Tensor]]:
    """The tables that turn codes of powers into integer numerators, one for each power in an octave, with its scale.

    With two steps, 2**(-code / 2) is 2**-(code / 2) for even codes, and sqrt(2) * 2**-((code + 1) / 2) for odd ones: a
    power of two with one of two scales. Each table is zero at the codes of the other, so that a value is their sum.

    Source: RepQ-ViT, Li et al. 2023, its log-sqrt2 quantizer.
    """
    steps, zero = powers.steps, int(powers.zero)
    lowest = -(-(zero - 1) // steps)  # the octave of the last power
    codes = torch.arange(zero + 1)
    octaves = (codes + steps - 1) // steps
    tables = []
    for step in range(steps):
        table = torch.where((codes < zero) & (codes % steps == step), 1 << (lowest - octaves).clamp(min=0), 0)
        tables.append((table, powers.scale * (sqrt(2.0) if step else 1.0) / float(1 << lowest)))
    return tables


def dense(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Values broadcast to a shape with a batch of one image."""
    return values.broadcast_to(shape)


def size_along(values: Tensor, axis: int) -> int:
    """The size of a broadcastable tensor along a negative axis; 1 where it has no such axis."""
    return values.shape[axis] if values.ndim >= -axis else 1


def compact(values: Tensor) -> Tensor:
    """The same values with size 1 along every axis along which they are constant, to be broadcast."""
    for axis in range(values.ndim):
        first = values.narrow(axis, 0, 1)
        if values.shape[axis] > 1 and torch.equal(values, first.expand_as(values)):
            values = first
    return values.contiguous()

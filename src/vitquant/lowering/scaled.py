"""Real tensors written as integers times real scales, which is what a quantized graph computes with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor
from torch.fx import Node


@dataclass(frozen=True)
class Term:
    """scale * (register - zero).

    Arguments:
        register: its name.
        zero: int64, broadcastable to the register.
        scale: float64, broadcastable to the register.
        numerators: whether the register has numerators of powers, of which products read more than 8 bits.
    """

    register: str
    zero: Tensor
    scale: Tensor
    numerators: bool = False


@dataclass(frozen=True)
class Powers(Term):
    """scale * 2**(-register / steps), and 0 where the register is zero.

    Codes move as they are; `numerators` makes sums of terms of them where something is computed.

    Arguments:
        steps: how many powers an octave has, 1 or 2.
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
        """The only term, if there is one only and no constant."""
        return self.terms[0] if len(self.terms) == 1 and not bool(self.constant.any()) else None

    def times(self, factor: Tensor) -> Scaled:
        """Multiplied by a constant, broadcastable to the shape."""
        factor = factor.double()
        terms = tuple(replace(term, scale=term.scale * factor) for term in self.terms)
        return Scaled(terms, self.constant * factor)

    def plus(self, other: Scaled | Tensor) -> Scaled:
        """With another of the same shape, or a broadcastable constant, added."""
        if isinstance(other, Tensor):
            return Scaled(self.terms, self.constant + other.double())
        return Scaled(self.terms + other.terms, self.constant + other.constant)


@dataclass(frozen=True)
class Static:
    """A tensor that is the same for every image: float64."""

    value: Tensor


@dataclass(frozen=True)
class Joined:
    """Parts that a concatenation puts side by side, before one quantizer stands behind it.

    Arguments:
        node: the graph's, whose shape the whole has.
    """

    parts: tuple[Scaled | Static, ...]
    axis: int
    node: Node


@dataclass(frozen=True)
class Masked:
    """Scores of which some are masked.

    Arguments:
        scores: all of them.
        mask: bool, broadcastable to them, True where masked.
        node: the graph's, whose shape they have.
        moved: nodes that rearranged them since. A mask repeats with the batch only in the shape in which it was
            applied, so the softmax is computed in that shape, and its result is rearranged.
        windows: how many rows of the batch one image has, where `mask` is one image's; None where it is each row's.
    """

    scores: Scaled
    mask: Tensor
    node: Node
    moved: tuple[Node, ...] = ()
    windows: int | None = None


def numerators(powers: Powers) -> list[tuple[Tensor, Tensor]]:
    """Integers that powers are sums of: for each of the steps of an octave a table of codes, and its scale.

    With two steps, 2**(-code / 2) is 2**-(code / 2), or sqrt(2) * 2**-((code + 1) / 2) of an odd code: a shift with one
    scale of two. Each table is zero for the codes of the others.

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
    """The size of what is broadcast along an axis, counted from the last: 1 where it has no such axis."""
    return values.shape[axis] if values.ndim >= -axis else 1


def compact(values: Tensor) -> Tensor:
    """The same values, broadcastable, with size 1 along every axis along which they do not change."""
    for axis in range(values.ndim):
        first = values.narrow(axis, 0, 1)
        if values.shape[axis] > 1 and torch.equal(values, first.expand_as(values)):
            values = first
    return values.contiguous()

"""What the model has computed in front of each block, held as far as a memory budget allows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Generic, Protocol, TypeVar

Prefix = TypeVar("Prefix")


class Prefixes(Protocol[Prefix]):
    """Computes what a model has in front of its blocks, batch by batch."""

    def compute(
        self, blocks: Sequence[int], known: Mapping[int, Sequence[Prefix]], skip: int = 0
    ) -> Iterator[dict[int, Prefix]]:
        """For each batch what is in front of some blocks.

        Arguments:
            blocks: their numbers.
            known: for at most one block, which is before all of them, what is in front of it in every batch.
            skip: how many batches are left out.
        """
        ...

    def of_one(self, blocks: Sequence[int]) -> dict[int, Prefix]:
        """What is in front of some blocks for the first image."""
        ...

    def nbytes(self, prefix: Prefix) -> int:
        """The bytes that it takes."""
        ...


class HeldPrefixes(Generic[Prefix]):
    """What is in front of each block, for all images, batch by batch.

    As many consecutive blocks as fit into the budget are computed by one pass over the images, the last ones first.
    Where not even one fits, the batches that fit are held and the others are computed anew each time.

    Arguments:
        prefixes: computes them; nothing in front of a block may change while what is in front of it is used.
        blocks: the numbers of the blocks.
        sizes: the number of images of each batch.
        memory: in bytes.
    """

    def __init__(
        self, prefixes: Prefixes[Prefix], blocks: Collection[int], sizes: Sequence[int], memory: float
    ) -> None:
        self._prefixes, self._blocks, self._sizes, self._memory = prefixes, blocks, sizes, memory
        self._held: dict[int, list[Prefix]] = {}
        self._bytes: dict[int, int] = {}  # of each block for one image

    def renew(self) -> None:
        """Forget what depends on what has changed: all but what is in front of the first block."""
        first = min(self._blocks)
        self._held = {block: held for block, held in self._held.items() if block == first and self._complete(held)}

    def batches(self, block: int) -> Iterator[Prefix]:
        """What is in front of a block, for each batch."""
        if block not in self._held:
            self._hold(block)
        held = self._held[block]
        yield from held
        if not self._complete(held):
            for found in self._prefixes.compute([block], {}, skip=len(held)):
                yield found[block]

    def _complete(self, held: Sequence[Prefix]) -> bool:
        return len(held) == len(self._sizes)

    def _hold(self, block: int) -> None:
        """Hold what is in front of a block, and of as many blocks before it as fit."""
        self._measure()
        first = min(self._blocks)
        known = {first: self._held[first]} if first in self._held else {}
        before = sorted((each for each in self._blocks if each < block and each not in known), reverse=True)
        free = self._memory / sum(self._sizes) - sum(self._bytes[each] for each in known)
        group = [block]
        for each in before:
            if sum(self._bytes[one] for one in [*group, each]) > free:
                break
            group.append(each)
        fits = self._sizes
        if self._bytes[block] > free:
            most = self._memory / self._bytes[block]  # images
            fits = [size for size, total in zip(self._sizes, accumulate(self._sizes), strict=True) if total <= most]
            known = {}
        self._held = {**known, **{each: [] for each in group}}
        for _, found in zip(fits, self._prefixes.compute(group, known), strict=False):
            for each in group:
                self._held[each].append(found[each])

    def _measure(self) -> None:
        if not self._bytes:
            found = self._prefixes.of_one(sorted(self._blocks))
            self._bytes = {block: self._prefixes.nbytes(each) for block, each in found.items()}

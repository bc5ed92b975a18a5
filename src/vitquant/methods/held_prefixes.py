"""The tensors in front of each block, computed once and held as far as a memory budget allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from torch import Tensor

from vitquant.graph.parts import in_parts
from vitquant.graph.segments import IMAGES, Segment
from vitquant.graph.walk import descendants, nodes_by_name
from vitquant.model import QuantizedModel


def suffix(model: QuantizedModel, block: int) -> Segment:
    """The part of a model from a block to its outputs, with its quantizers.

    Outputs that the part does not compute are among its inputs.

    Arguments:
        block: a number of `model.index.blocks`.
    """
    nodes = nodes_by_name(model.graph_module.graph)
    numbers = [site.block for site in model.sites]
    sites = model.sites[numbers.index(block) :]
    outputs = [site for site in model.sites if site.kind == "output"]
    computed = {nodes[site.node] for site in sites if site.kind != "output"}
    behind = descendants(computed, model.graph_module.graph) | computed
    early = [site.name for site in outputs if nodes[site.operands["input"]] not in behind]
    inputs, _ = model.boundary([site for site in sites if site.name not in early])
    return model.segment([*inputs, *early], [site.name for site in outputs])


class HeldPrefixes:
    """The inputs of the suffixes of a model, for all images, batch by batch.

    As many consecutive blocks as fit into the budget are computed by one pass over the images, the last ones first.
    Where not even one fits, the batches that fit are held and the others are computed anew each time.

    Arguments:
        model: its quantizers in front of a block must not change while the block's inputs are used.
        data: batches of images, (batch, channels, height, width); iterated over for every pass.
        sizes: the number of images of each batch.
        inputs: the names of the inputs of each block's suffix, by the number of the block.
        memory: in bytes.
    """

    def __init__(
        self,
        model: QuantizedModel,
        data: Iterable[Tensor],
        sizes: Sequence[int],
        inputs: Mapping[int, tuple[str, ...]],
        memory: float,
    ) -> None:
        self._model, self._data, self._sizes, self._inputs, self._memory = model, data, sizes, inputs, memory
        self._bytes: dict[int, int] | None = None  # of the inputs of a block for one image
        self._held: dict[int, list[tuple[Tensor, ...]]] = {}

    def renew(self) -> None:
        """Forget what depends on quantizers that have changed: all but the inputs of the first block."""
        first = min(self._inputs)
        self._held = {block: held for block, held in self._held.items() if block == first and self._complete(held)}

    def batches(self, block: int) -> Iterator[tuple[Tensor, ...]]:
        """The inputs of a block's suffix, for each batch."""
        if block not in self._held:
            self._hold(block)
        held = self._held[block]
        yield from held
        if not self._complete(held):
            compute = self._model.segment(IMAGES, self._inputs[block])
            for number, images in enumerate(self._data):
                if number >= len(held):
                    yield in_parts(compute, [images], len(images))

    def _complete(self, held: Sequence[tuple[Tensor, ...]]) -> bool:
        return len(held) == len(self._sizes)

    def _hold(self, block: int) -> None:
        """Hold the inputs of a block, and of as many blocks before it as fit."""
        needed = self._needed()
        first = min(self._inputs)
        known = self._held.get(first)
        before = sorted((each for each in self._inputs if each <= block and each not in self._held), reverse=True)
        free = self._memory / sum(self._sizes) - (needed[first] if known else 0)
        group = [block]
        for each in before[1:]:
            if sum(needed[one] for one in [*group, each]) > free:
                break
            group.append(each)
        fits = self._sizes
        if needed[block] > free:
            most = self._memory / needed[block]  # images
            fits = [size for size, total in zip(self._sizes, accumulate(self._sizes), strict=True) if total <= most]
            known = None
        self._held = {first: known} if known else {}
        names = [name for each in group for name in self._inputs[each]]
        distinct = list(dict.fromkeys(names))
        if known:
            compute = self._model.segment(self._inputs[first], distinct)
            found = (in_parts(compute, *each) for each in zip(known, self._sizes, strict=True))
        else:
            compute = self._model.segment(IMAGES, distinct)
            found = (in_parts(compute, [images], len(images)) for images in self._data)
        self._held |= {each: [] for each in group}
        for _, tensors in zip(fits, found, strict=False):
            by_name = dict(zip(distinct, tensors, strict=True))
            for each in group:
                self._held[each].append(tuple(by_name[name] for name in self._inputs[each]))

    def _needed(self) -> dict[int, int]:
        if self._bytes is None:
            names = sorted({name for inputs in self._inputs.values() for name in inputs})
            one = next(iter(self._data))[:1]
            sizes = dict(zip(names, (x.nbytes for x in self._model.segment(IMAGES, names)(one)), strict=True))
            self._bytes = {block: sum(sizes[name] for name in names) for block, names in self._inputs.items()}
        return self._bytes

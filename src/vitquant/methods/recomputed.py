"""The outputs of a quantized model for the calibration images, computed again from a block on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from vitquant.graph.parts import in_parts
from vitquant.graph.segments import IMAGES, Segment
from vitquant.graph.walk import descendants, nodes_by_name
from vitquant.methods.held_prefixes import HeldPrefixes
from vitquant.model import QuantizedModel


class Recomputed(Protocol):
    """The outputs of a model while the quantizers of one block after another change, from the last block on."""

    def outputs(self, block: int) -> Iterator[tuple[Tensor, ...]]:
        """The model's outputs for each batch, with the quantizers that it has now.

        Arguments:
            block: nothing has changed in front of it since `renew`.
        """
        ...

    def changed(self, block: int) -> None:
        """Take note that quantizers or stored tensors of a block have changed."""
        ...

    def renew(self) -> None:
        """Take note that the next blocks are in front of those that have changed."""
        ...


# From a model, batches of images, their sizes, the names of what changes in each block, and a memory budget in bytes.
Recompute = Callable[
    [QuantizedModel, Iterable[Tensor], Sequence[int], Mapping[int, Collection[str]], float], Recomputed
]


class RecomputedSimulation:
    """The outputs of the simulation, from the tensors in front of a block.

    Arguments:
        model: its quantizers and stored tensors change.
        data: batches of images, (batch, channels, height, width); iterated over for every pass.
        sizes: the number of images of each batch.
        changing: for each block the names of the values whose quantizers change, and of stored tensors that do.
        memory: bytes of tensors that may be held.
    """

    def __init__(
        self,
        model: QuantizedModel,
        data: Iterable[Tensor],
        sizes: Sequence[int],
        changing: Mapping[int, Collection[str]],
        memory: float,
    ) -> None:
        self._model, self._data, self._sizes = model, data, sizes
        self._suffixes = {block: suffix(model, block) for block in changing}
        self.held = HeldPrefixes[tuple[Tensor, ...]](self, changing, sizes, memory)

    def outputs(self, block: int) -> Iterator[tuple[Tensor, ...]]:
        """See `Recomputed`."""
        for inputs, size in zip(self.held.batches(block), self._sizes, strict=True):
            yield in_parts(self._suffixes[block], inputs, size)

    def changed(self, block: int) -> None:
        """Do nothing: segments share the quantizers of the model."""

    def renew(self) -> None:
        """See `Recomputed`."""
        self.held.renew()

    def compute(
        self, blocks: Sequence[int], known: Mapping[int, Sequence[tuple[Tensor, ...]]], skip: int = 0
    ) -> Iterator[dict[int, tuple[Tensor, ...]]]:
        """The inputs of the suffixes of some blocks for each batch, see `Prefixes`."""
        inputs = {block: self._suffixes[block].inputs for block in blocks}
        names = list(dict.fromkeys(name for each in inputs.values() for name in each))
        (first, held), *_ = [*known.items(), (None, ())]
        source = IMAGES if first is None else self._suffixes[first].inputs
        segment = self._model.segment(source, names)
        batches = ([images] for images in self._data) if first is None else iter(held)
        for number, tensors in enumerate(batches):
            if number >= skip:
                found = dict(zip(names, in_parts(segment, tensors, self._sizes[number]), strict=True))
                yield {block: tuple(found[name] for name in each) for block, each in inputs.items()}

    def nbytes(self, prefix: tuple[Tensor, ...]) -> int:
        """The bytes of the tensors in front of a block."""
        return sum(each.nbytes for each in prefix)


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

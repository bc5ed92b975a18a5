"""The outputs of a quantized model for the calibration images, computed again from a block on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from vitquant.graph.parts import in_parts
from vitquant.graph.segments import IMAGES, Segment
from vitquant.graph.taps import by_image
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
        """Take note that quantizers or stored tensors of a block have changed.

        Raises:
            LoweringError: the model cannot be deployed as it is now.
        """
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
        self._outputs = [site.name for site in model.sites if site.kind == "output"]
        self._suffixes = {block: suffix(model, block) for block in changing}
        # What is in front of a block: the inputs of its suffix, and the outputs that the suffix does not compute.
        self._names = {
            block: (*part.inputs, *(name for name in self._outputs if name not in part.outputs))
            for block, part in self._suffixes.items()
        }
        self._whole = model.segment(IMAGES, self._outputs)
        self.held = HeldPrefixes[tuple[Tensor, ...]](self, changing, sizes, memory)

    def outputs(self, block: int) -> Iterator[tuple[Tensor, ...]]:
        """See `Recomputed`."""
        part = self._suffixes[block]
        for tensors, size in zip(self.held.batches(block), self._sizes, strict=True):
            found = dict(zip(self._names[block], tensors, strict=True))
            computed = in_parts(part, tensors[: len(part.inputs)], size)
            found |= dict(zip(part.outputs, computed, strict=True))
            yield by_images(self._whole, [found[name] for name in self._outputs], size)

    def changed(self, block: int) -> None:
        """Do nothing: segments share the quantizers of the model."""

    def renew(self) -> None:
        """See `Recomputed`."""
        self.held.renew()

    def compute(
        self, blocks: Sequence[int], known: Mapping[int, Sequence[tuple[Tensor, ...]]], skip: int = 0
    ) -> Iterator[dict[int, tuple[Tensor, ...]]]:
        """The inputs of the suffixes of some blocks for each batch, see `Prefixes`."""
        (first, held), *_ = [*known.items(), (None, ())]
        before = () if first is None else self._names[first]  # computed already
        names = [name for name in self._in_front(blocks) if name not in before]
        inputs = IMAGES if first is None else self._suffixes[first].inputs
        segment = self._model.segment(inputs, names)
        batches = ((images,) for images in self._data) if first is None else iter(held)
        for number, tensors in enumerate(batches):
            if number >= skip:
                found = dict(zip(before, tensors, strict=True)) if first is not None else {}
                read = tensors[: len(segment.inputs)]
                found |= dict(zip(names, in_parts(segment, read, self._sizes[number]), strict=True))
                yield {block: tuple(found[name] for name in self._names[block]) for block in blocks}

    def of_one(self, blocks: Sequence[int]) -> dict[int, tuple[Tensor, ...]]:
        """The same for one image."""
        names = self._in_front(blocks)
        tensors = self._model.segment(IMAGES, names)(next(iter(self._data))[:1])
        found = dict(zip(names, tensors, strict=True))
        return {block: tuple(found[name] for name in self._names[block]) for block in blocks}

    def nbytes(self, prefix: tuple[Tensor, ...]) -> int:
        """The bytes of the tensors in front of a block."""
        return sum(each.nbytes for each in prefix)

    def _in_front(self, blocks: Sequence[int]) -> list[str]:
        """The names of the tensors in front of some blocks."""
        return list(dict.fromkeys(name for block in blocks for name in self._names[block]))


def by_images(segment: Segment, outputs: Sequence[Tensor], images: int) -> tuple[Tensor, ...]:
    """The outputs of a segment for a batch, each as (images, ...).

    Arguments:
        images: the number of images.
    """
    axes = [segment.shapes[name].index(-1) for name in segment.outputs]
    whole = (by_image(each, axis, images) for each, axis in zip(outputs, axes, strict=True))
    return tuple(each.squeeze(1) if each.ndim > 2 and each.shape[1] == 1 else each for each in whole)


def suffix(model: QuantizedModel, block: int) -> Segment:
    """The part of a model from a block to the outputs that depend on it, with its quantizers.

    Arguments:
        block: a number of `model.index.blocks`.
    """
    nodes = nodes_by_name(model.graph_module.graph)
    numbers = [site.block for site in model.sites]
    sites = model.sites[numbers.index(block) :]
    computed = {nodes[site.node] for site in sites if site.kind != "output"}
    behind = descendants(computed, model.graph_module.graph) | computed
    outputs = [site for site in model.sites if site.kind == "output" and nodes[site.operands["input"]] in behind]
    inputs, _ = model.boundary([site for site in sites if site.kind != "output" or site in outputs])
    return model.segment(inputs, [site.name for site in outputs])

"""The outputs of a model's integer program while its scales and weights change, computed again from a block on."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from vitquant.errors import LoweringError
from vitquant.graph.captured import CapturedModel
from vitquant.lowering.following import FollowingProgram
from vitquant.lowering.promise import promised
from vitquant.methods.held_prefixes import HeldPrefixes
from vitquant.model import QuantizedModel
from vitquant.program.checking import check_program
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.on_images import quantization_of

_Registers = list[dict[str, Tensor]]  # of a batch, a few images at a time


class RecomputedProgram:
    """The outputs of the integer program, from its registers in front of a block.

    Only the constants that depend on what has changed are replaced: nothing else is lowered again.

    Arguments:
        model: calibrated, its operations still in float; it shares its quantizers and stored tensors with the program.
        data, sizes, changing, memory: see `RecomputedSimulation`.

    Raises:
        LoweringError: the recipe does not promise integers, or the model cannot be lowered.
    """

    def __init__(
        self,
        model: QuantizedModel,
        data: Iterable[Tensor],
        sizes: Sequence[int],
        changing: Mapping[int, Collection[str]],
        memory: float,
    ) -> None:
        self._data, self._sizes, self._changing = data, sizes, changing
        self._following = FollowingProgram(_in_integers(model))
        self._starts = {block: self._following.follow(names) for block, names in changing.items()}
        self._put()
        self.held = HeldPrefixes[_Registers](self, changing, sizes, memory)

    def outputs(self, block: int) -> Iterator[tuple[Tensor, ...]]:
        """The real values of the outputs' codes for each batch, float32; see `Recomputed`."""
        _, ends = quantization_of(self._following.program)
        for registers in self.held.batches(block):
            found = [self._interpreter.since(part, self._starts[block]) for part in registers]
            yield tuple(end.decode(torch.cat([part[name] for part in found])) for name, end in ends.items())

    def changed(self, block: int) -> None:
        """See `Recomputed`.

        Raises:
            LoweringError: the changed model has no integers, or a sum could overflow: it cannot be deployed.
        """
        self._following.follow(self._changing[block])
        self._put()

    def renew(self) -> None:
        """See `Recomputed`."""
        self.held.renew()

    def compute(
        self, blocks: Sequence[int], known: Mapping[int, Sequence[_Registers]], skip: int = 0
    ) -> Iterator[dict[int, _Registers]]:
        """The registers that the instructions from each block on read, for each batch; see `Prefixes`."""
        (first, held), *_ = [*known.items(), (None, ())]
        begun = (self._begun(batch) for batch in self._data) if first is None else iter(held)
        for number, parts in enumerate(begun):
            if number >= skip:
                yield self._in_front(blocks, parts, 0 if first is None else self._starts[first])

    def of_one(self, blocks: Sequence[int]) -> dict[int, _Registers]:
        """The same for one image."""
        return self._in_front(blocks, self._begun(next(iter(self._data))[:1]), 0)

    def nbytes(self, prefix: _Registers) -> int:
        """The bytes of the registers in front of a block."""
        return sum(each.nbytes for part in prefix for each in part.values())

    def _begun(self, images: Tensor) -> _Registers:
        encoding, _ = quantization_of(self._following.program)
        return self._interpreter.begun(encoding.encode(images))

    def _in_front(self, blocks: Sequence[int], parts: _Registers, at: int) -> dict[int, _Registers]:
        """The registers in front of each block, from those in front of the instruction `at`."""
        found: dict[int, _Registers] = {}
        for block in sorted(blocks, key=self._starts.__getitem__):
            parts = [self._interpreter.between(part, at, self._starts[block]) for part in parts]
            at, found[block] = self._starts[block], parts
        return found

    def _put(self) -> None:
        check_program(self._following.program)
        self._interpreter = Interpreter(self._following.program)


def _in_integers(model: QuantizedModel) -> QuantizedModel:
    """A model on integers that shares quantizers and stored tensors with a model whose operations are in float."""
    arithmetic = promised(model.recipe)
    if arithmetic is None:
        raise LoweringError(f"{model.recipe.name} leaves operations in float", "lay +fully-integer over it")
    graph = GraphModule(model.graph_module, copy.deepcopy(model.graph_module.graph))
    shared = QuantizedModel(CapturedModel(graph, model.input_shape, model.index), model.recipe, model.bits)
    shared.insert({})
    shared.compute_in_integers(arithmetic)
    return shared

"""The losses of a model on some batches, while the parameters of its blocks change; here or in several processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vitquant.errors import LoweringError
from vitquant.methods.evolving_block import EvolvingBlock
from vitquant.methods.recomputed import Recompute, Recomputed
from vitquant.model import QuantizedModel
from vitquant.objectives.output_loss import OUTPUT_LOSSES, batch_loss
from vitquant.workers.worker import Kept, Worker, Workers


@dataclass(frozen=True)
class Trial:
    """What is to be evaluated; it says everything, whatever was evaluated before.

    Arguments:
        passed: how many passes over the blocks have ended.
        block: nothing in front of it has changed in this pass.
        genes: of every block, float64 (n,).
    """

    passed: int
    block: int
    genes: Mapping[int, Tensor]


class Shard:
    """Some batches, and the losses of the model on them.

    Arguments:
        blocks: of the model, by number.
        recomputed: the outputs of the model for these batches.
        references: the float outputs of each batch.
        loss: one of `OUTPUT_LOSSES`.
    """

    def __init__(
        self,
        blocks: Mapping[int, EvolvingBlock],
        recomputed: Recomputed,
        references: Sequence[Sequence[Tensor]],
        loss: str,
    ) -> None:
        self._blocks, self._recomputed, self._references, self._loss = blocks, recomputed, references, loss
        self._genes = {number: block.current for number, block in blocks.items()}
        self._passed = 0

    def __call__(self, trial: Trial) -> list[float]:
        """The sum of the loss over the images of each batch; infinite if the model cannot be deployed."""
        if trial.passed != self._passed:
            self._recomputed.renew()
            self._passed = trial.passed
        try:
            with torch.no_grad():
                self._put(trial.genes)
        except LoweringError:
            return [math.inf]
        loss = OUTPUT_LOSSES[self._loss]
        with torch.inference_mode():
            batches = zip(self._recomputed.outputs(trial.block), self._references, strict=True)
            return [batch_loss(loss, outputs, references) for outputs, references in batches]

    def _put(self, genes: Mapping[int, Tensor]) -> None:
        for number, each in genes.items():
            known = self._genes.pop(number, None)  # unknown if it cannot be deployed
            if known is None or not torch.equal(each, known):
                self._blocks[number].put(each)
                self._recomputed.changed(number)
            self._genes[number] = each


class Shards:
    """Shards in several processes, each with batches of its own, which stay there.

    Arguments:
        workers: of the shards, in the order of their batches.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = workers

    def __call__(self, trial: Trial) -> list[float]:
        """The sum of the loss over the images of each batch, see `Shard`."""
        for each in self._workers:
            each.ask(trial)
        return [loss for each in self._workers for loss in each.answer()]


@dataclass(frozen=True)
class ShardFactory:
    """Makes a shard in another process.

    Arguments:
        model, blocks: share their quantizers; they are pickled together.
        batches: of images.
        sizes: the number of images of each batch.
        references, loss: see `Shard`.
        recompute, memory: compute the outputs within some bytes.
    """

    model: QuantizedModel
    blocks: Mapping[int, EvolvingBlock]
    batches: Sequence[Kept]
    sizes: Sequence[int]
    references: Sequence[Sequence[Tensor]]
    loss: str
    recompute: Recompute
    memory: float

    def __call__(self) -> Shard:
        """The shard."""
        changing = {number: block.changing for number, block in self.blocks.items()}
        with torch.no_grad():
            recomputed = self.recompute(self.model, _Read(self.batches), self.sizes, changing, self.memory)
        return Shard(self.blocks, recomputed, self.references, self.loss)


def shards(workers: Workers, whole: ShardFactory) -> Shards:
    """Start a shard for each worker, as long as there are batches for it.

    Arguments:
        workers: where they run.
        whole: all batches, and the memory of all shards.
    """
    count = min(workers.count, len(whole.batches))
    ends = [len(whole.batches) * number // count for number in range(count + 1)]
    started: list[Worker] = []
    for start, end in pairwise(ends):
        part = slice(start, end)
        started.append(
            workers.start(
                ShardFactory(
                    whole.model,
                    whole.blocks,
                    whole.batches[part],
                    whole.sizes[part],
                    whole.references[part],
                    whole.loss,
                    whole.recompute,
                    whole.memory / count,
                )
            )
        )
    return Shards(started)


@dataclass(frozen=True)
class _Read:
    """Batches that are read each time."""

    batches: Sequence[Kept]

    def __iter__(self) -> Iterator[Tensor]:
        return (read() for read in self.batches)

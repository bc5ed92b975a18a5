"""The loss and the answers of one form of a model, for any scales of one of its blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitquant.errors import LoweringError
from vitquant.methods.evolving_block import EvolvingBlock
from vitquant.methods.recomputed import Recomputed
from vitquant.objectives.output_loss import OUTPUT_LOSSES, batch_loss

Same = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class References:
    """What the float model gives, batch by batch: first the calibration images, then those held out.

    Arguments:
        outputs: for each batch, (images, ...) for each output.
        sizes: the number of images of each batch.
        calibration: the number of batches of calibration images.
        names: of the outputs.
        same: maps outputs of the quantized and of the float model, by name, to the images with the same answer, bool
            (images,); None if answers are never exactly the same.
    """

    outputs: Sequence[Sequence[Tensor]]
    sizes: Sequence[int]
    calibration: int
    names: Sequence[str]
    same: Same | None


class Evaluation:
    """One form of a model, while the scales of one block change.

    Arguments:
        block, number: what changes.
        recomputed: the outputs of the form for all batches.
        references: of the float model.
        loss: one of `OUTPUT_LOSSES`.
    """

    def __init__(
        self, block: EvolvingBlock, number: int, recomputed: Recomputed, references: References, loss: str
    ) -> None:
        self._block, self._number, self._recomputed, self._references = block, number, recomputed, references
        self._loss = OUTPUT_LOSSES[loss]

    def loss(self, genes: Tensor) -> float:
        """The mean loss on the calibration images, which a search may see; infinite if it cannot be deployed.

        Arguments:
            genes: float64 (n,), of the block.
        """
        try:
            self.put(genes)
        except LoweringError:
            return math.inf
        sizes = self._references.sizes[: self._references.calibration]
        return sum(loss for loss, _ in self._batches(len(sizes))) / sum(sizes)

    def measure(self, genes: Tensor) -> tuple[float, float, float | None] | tuple[None, None, None]:
        """Everything about a point; None if it cannot be deployed or a loss is not finite.

        Arguments:
            genes: float64 (n,), of the block.

        Returns:
            The mean loss on calibration images and on images held out, and the per cent of these with the same answer.
        """
        try:
            self.put(genes)
        except LoweringError:
            return None, None, None
        calibration, sizes = self._references.calibration, self._references.sizes
        losses, answers = zip(*self._batches(len(sizes)), strict=True)
        seen, unseen = sum(sizes[:calibration]), sum(sizes[calibration:])
        loss, held_out = sum(losses[:calibration]) / seen, sum(losses[calibration:]) / unseen
        if not (math.isfinite(loss) and math.isfinite(held_out)):
            return None, None, None
        same = None if self._references.same is None else 100 * sum(answers[calibration:]) / unseen
        return loss, held_out, same

    def put(self, genes: Tensor) -> None:
        """Set the scales of the block.

        Arguments:
            genes: float64 (n,), of the block.

        Raises:
            LoweringError: the model cannot be deployed with them.
        """
        self._block.put(genes)
        self._recomputed.changed(self._number)

    @torch.inference_mode()
    def _batches(self, count: int) -> list[tuple[float, int]]:
        """For each of the first batches the sum of the loss, and the number of images with the same answer."""
        outputs = zip(self._references.outputs[:count], self._recomputed.outputs(self._number), strict=False)
        return [(batch_loss(self._loss, found, each), self._answers(found, each)) for each, found in outputs]

    def _answers(self, found: Sequence[Tensor], reference: Sequence[Tensor]) -> int:
        if self._references.same is None:
            return 0
        pair = (dict(zip(self._references.names, each, strict=True)) for each in (found, reference))
        return int(self._references.same(*pair).sum())

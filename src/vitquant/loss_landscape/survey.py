"""The measurement of a block: the search of its scales, and every point of every line in every form of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from vitquant.errors import CalibrationError
from vitquant.loss_landscape.evaluation import Evaluation
from vitquant.loss_landscape.kept_numbers import KeptNumbers
from vitquant.loss_landscape.lines import Line
from vitquant.loss_landscape.table import Curve, Found, MeasuredLine
from vitquant.methods.context import Context
from vitquant.methods.scale_evolution import SEARCHES, EvolveScalesSettings
from vitquant.search.evolution import EvolutionSettings
from vitquant.search.genes import Genes


@dataclass
class Survey:
    """Evaluations of a block in every form of its model, counted and kept.

    Arguments:
        genes: of the block.
        forms: by their names.
        kept: what the forms give, and what an interrupted run kept of it.
        context: has the seed, and is told the progress.
        total: the number of evaluations of all that will be asked for.
        done: the number of those so far.
    """

    genes: Genes
    forms: Mapping[str, Evaluation]
    kept: KeptNumbers
    context: Context
    total: int
    done: int = 0

    def search(self, settings: EvolveScalesSettings, cycles: int) -> tuple[Tensor, Found]:
        """Search as `evolve_scales` does in one pass over the block, and return what it found.

        Arguments:
            settings: of the search; its fitness is the form of the model.
            cycles: the number of children.

        Raises:
            CalibrationError: the loss of the model as it was quantized is not finite.
        """
        form, what = self.forms[settings.fitness], f"searching by the {settings.fitness}"
        before = self._loss(form, self.genes.start)
        if before == math.inf:
            raise _not_finite(settings.fitness)
        size = EvolutionSettings(settings.population, settings.sample, settings.rate)
        search = SEARCHES[settings.search](self.genes, before, size, self.context.generator("evolve-scales 0"))
        for _ in range(cycles):
            self._tell(f"{what}: loss {search.best[1]:.6g}")
            child = search.ask()
            search.tell(child, self._loss(form, child))
        found, after = search.best
        return found, Found(settings.search, settings.fitness, cycles, before, after)

    def measure(self, lines: Sequence[Line]) -> tuple[MeasuredLine, ...]:
        """All lines in all forms.

        Raises:
            CalibrationError: the loss of the model as it was quantized is not finite.
        """
        curves = {name: [self._curve(name, form, line) for line in lines] for name, form in self.forms.items()}
        return tuple(
            MeasuredLine(line.name, line.positions, {name: curves[name][place] for name in self.forms})
            for place, line in enumerate(lines)
        )

    def leave(self) -> None:
        """Leave the block as it was, and keep what was measured."""
        for form in self.forms.values():
            form.put(self.genes.start)
        self.kept.keep()

    def _curve(self, name: str, form: Evaluation, line: Line) -> Curve:
        found: list[Sequence[float | None]] = []
        for position, point in zip(line.positions, line.points, strict=True):
            self._tell(f"{name}, {line.name}")
            found.append(self.kept.next(3, partial(form.measure, point)))
            if position == 0 and found[-1][0] is None:
                raise _not_finite(name)
        losses, held_out, answers = zip(*found, strict=True)
        return Curve(losses, held_out, None if all(each is None for each in answers) else answers)

    def _loss(self, form: Evaluation, genes: Tensor) -> float:
        (loss,) = self.kept.next(1, lambda: [form.loss(genes)])
        return math.inf if loss is None else loss

    def _tell(self, what: str) -> None:
        self.context.progress(what, self.done, self.total)
        self.done += 1


def _not_finite(form: str) -> CalibrationError:
    return CalibrationError(f"the {form} of the quantized model gives no finite loss")

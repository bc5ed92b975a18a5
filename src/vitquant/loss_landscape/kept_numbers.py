"""The numbers of a landscape in the order in which they are measured, kept so that a killed run continues."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from vitquant.schema import ListOf, Number, Table, maybe
from vitquant.work import WorkState

_MOST = 1e100
_KEPT = Table({"numbers": ListOf(ListOf(maybe(Number(-_MOST, _MOST))))})


class KeptNumbers:
    """What evaluations gave, one after another: first those that an interrupted run kept, then new ones.

    A run with the same inputs asks for the same evaluations in the same order, the children of its search included,
    since they follow from the losses before them.

    Arguments:
        work: where they are kept.

    Raises:
        CheckpointError: what is kept there is damaged.
    """

    def __init__(self, work: WorkState) -> None:
        self._work, self._saved = work, work.load(_KEPT)
        self._known: list[list[float | None]] = [] if self._saved is None else self._saved.values["numbers"]
        self._asked = 0

    def next(self, size: int, measured: Callable[[], Sequence[float | None]]) -> Sequence[float | None]:
        """The numbers of the next evaluation, with None for those that are not finite.

        Arguments:
            size: how many they are.
            measured: measures them, if they are not known.

        Raises:
            CheckpointError: the evaluation that is kept has another number of them.
        """
        if self._asked == len(self._known):
            self._known.append([None if each is None or not math.isfinite(each) else each for each in measured()])
            if self._work.due:
                self.keep()
        found = self._known[self._asked]
        if len(found) != size:
            assert self._saved is not None  # what was measured now has the right size
            raise self._saved.damaged()
        self._asked += 1
        return found

    def keep(self) -> None:
        """Save what is known; `next` does so when it is time."""
        self._work.save({}, {"numbers": self._known})

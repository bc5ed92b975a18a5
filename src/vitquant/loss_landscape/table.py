"""A measured landscape, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vitquant.loss_landscape.jaggedness import jaggedness

SIMULATION, INTEGERS = "simulation", "integers"
FORMS = (SIMULATION, INTEGERS)
SEARCHED = "searched"  # the name of the line to what a search found


@dataclass(frozen=True)
class Curve:
    """What one form of a model gives at the points of a line; None where a point cannot be deployed or is not finite.

    Arguments:
        loss: the mean loss on the calibration images.
        held_out_loss: the same on images that nothing was chosen by.
        agreement: the per cent of these that get the float model's class; None for models without classes.
    """

    loss: tuple[float | None, ...]
    held_out_loss: tuple[float | None, ...]
    agreement: tuple[float | None, ...] | None


@dataclass(frozen=True)
class Found:
    """What the search of the scales found.

    Arguments:
        search: its name.
        by: the form of the model whose loss it lowered.
        evaluations: the number of children.
        before, after: the loss on the calibration images.
    """

    search: str
    by: str
    evaluations: int
    before: float
    after: float


@dataclass(frozen=True)
class MeasuredLine:
    """A line through the scales of a block, and the curves along it.

    Arguments:
        name: `random 1`, `random 2`, ..., or `SEARCHED`.
        positions: t of each point; the model as it was quantized is at 0, and what a search found at 1 of `searched`.
        curves: by form, `simulation` and `integers`.
    """

    name: str
    positions: tuple[float, ...]
    curves: Mapping[str, Curve]

    def at(self, form: str, position: float) -> tuple[float | None, float | None, float | None]:
        """The loss, the held-out loss and the agreement of a form at a position that is a point's."""
        curve, place = self.curves[form], self.positions.index(position)
        agreement = None if curve.agreement is None else curve.agreement[place]
        return curve.loss[place], curve.held_out_loss[place], agreement

    @property
    def difference(self) -> float | None:
        """The largest difference between the losses of the two forms; None where there are none to compare."""
        if len(self.curves) < len(FORMS):
            return None
        pairs = zip(*(self.curves[form].loss for form in FORMS), strict=True)
        return max((abs(a - b) for a, b in pairs if a is not None and b is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain JSON values, with the jaggedness of each curve of losses."""
        curves: dict[str, Any] = {}
        for form, curve in self.curves.items():
            found = jaggedness(self.positions, curve.loss)
            curves[form] = {**asdict(curve), "jaggedness": None if found is None else asdict(found)}
        return {"name": self.name, "t": self.positions, "curves": curves, "largest_difference": self.difference}


@dataclass(frozen=True)
class Landscape:
    """The loss of a quantized model along lines through the scales of one of its blocks.

    Arguments:
        block: the number of the block.
        operands: the names of the values whose scales change.
        scales: how many numbers change.
        loss: one of `OUTPUT_LOSSES`.
        lines: random ones, then the searched one.
        found: by the search; None without one.
        simulated: why there are no integers; empty where there are.
        about: facts about the model, the recipe and the images, plain JSON values.
    """

    block: int
    operands: tuple[str, ...]
    scales: int
    loss: str
    lines: tuple[MeasuredLine, ...]
    found: Found | None = None
    simulated: str = ""
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms of the model that were measured."""
        return tuple(self.lines[0].curves)

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain JSON values."""
        return {
            **self.about,
            "block": self.block,
            "operands": list(self.operands),
            "scales": self.scales,
            "loss": self.loss,
            "simulated": self.simulated,
            "found": None if self.found is None else asdict(self.found),
            "lines": [each.to_dict() for each in self.lines],
        }

    def to_json(self) -> str:
        """All numbers as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

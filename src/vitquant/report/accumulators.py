"""What an integer program's sums can hold, site by site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vitquant.program.instructions import (
    Convolution,
    IntegerProgram,
    Linear,
    Multiply,
    Product,
    Sum,
    type_limits,
)
from vitquant.program.ranges import prove_ranges


@dataclass(frozen=True)
class Accumulator:
    """The register in which an operation sums.

    Arguments:
        type: its type, such as `s32`.
        low, high: the smallest and the largest value that any image can give it.
    """

    type: str
    low: int
    high: int

    @property
    def headroom(self) -> int:
        """How many bits of the type are never used."""
        _, most = type_limits(self.type)
        return most.bit_length() - max(self.high.bit_length(), (-self.low - 1).bit_length() if self.low < 0 else 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"type": self.type, "low": self.low, "high": self.high, "headroom_bits": self.headroom}


def accumulators(program: IntegerProgram) -> dict[str, Accumulator]:
    """For each site that sums, its accumulator; for one that sums several times, the fullest."""
    ranges, found = prove_ranges(program), dict[str, Accumulator]()
    for each in program.instructions:
        if isinstance(each, Linear | Convolution | Product | Multiply | Sum):
            here = Accumulator(program.registers[each.output].type, *ranges[each.output])
            found[each.site] = min(here, found.get(each.site, here), key=lambda a: a.headroom)
    return found

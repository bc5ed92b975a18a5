"""The accumulators of an integer program, site by site, with their ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_never

from vitquant.program import instructions as p
from vitquant.program.ranges import prove_ranges


@dataclass(frozen=True)
class Accumulator:
    """The register in which an operation sums.

    Arguments:
        type: its type, such as `s32`.
        low, high: the smallest and the largest value that it can have for any image.
    """

    type: str
    low: int
    high: int

    @property
    def headroom(self) -> int:
        """The number of bits of the type that are never used."""
        _, most = p.type_limits(self.type)
        return most.bit_length() - max(self.high.bit_length(), (-self.low - 1).bit_length() if self.low < 0 else 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"type": self.type, "low": self.low, "high": self.high, "headroom_bits": self.headroom}


def accumulators(program: p.IntegerProgram) -> dict[str, Accumulator]:
    """For each site that sums, its accumulator; of several accumulators the one with the least headroom."""
    ranges, found = prove_ranges(program), dict[str, Accumulator]()
    for each in program.instructions:
        if _sums(each):
            here = Accumulator(program.registers[each.output].type, *ranges[each.output])
            found[each.site] = min(here, found.get(each.site, here), key=lambda a: a.headroom)
    return found


def _sums(instruction: p.Instruction) -> bool:
    """Whether an instruction's output is an accumulator."""
    match instruction:
        case p.Linear() | p.Convolution() | p.Product() | p.Multiply() | p.Sum():
            return True
        case p.Requantize() | p.SoftmaxToPowers() | p.SoftmaxToLevels() | p.Lookup() | p.Concat():
            return False
        case p.LayerNorm() | p.RmsNorm():
            return False
        case p.Reshape() | p.Permute() | p.Slice() | p.Roll() | p.Pad():
            return False
        case _:
            assert_never(instruction)

"""Functions of one code, as tables."""

from __future__ import annotations

from torch import Tensor


def look_up(codes: Tensor, table: Tensor, lowest: int) -> Tensor:
    """The table's entry for each code.

    Arguments:
        codes: int64, from `lowest` to `lowest + len(table) - 1`.
        table: int64 (levels,).
    """
    return table.take(codes - lowest)

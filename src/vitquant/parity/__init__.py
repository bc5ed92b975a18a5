"""Comparison of the forms of one model: float, simulated, integer program, exported files."""

from vitquant.parity.comparison import ALONE, Comparison, compare
from vitquant.parity.examine import Form, ParityReport, examine
from vitquant.parity.flips import FLIPPED, RESCALING, Flips, flipped_codes

__all__ = [
    "ALONE",
    "FLIPPED",
    "RESCALING",
    "Comparison",
    "Flips",
    "Form",
    "ParityReport",
    "compare",
    "examine",
    "flipped_codes",
]

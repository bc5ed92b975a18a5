"""How far apart the forms of one model are."""

from vitquant.parity.comparison import Comparison, compare
from vitquant.parity.examine import Form, ParityReport, examine
from vitquant.parity.flips import FLIPPED, RESCALING, Flips, flipped_codes

__all__ = ["FLIPPED", "RESCALING", "Comparison", "Flips", "Form", "ParityReport", "compare", "examine", "flipped_codes"]

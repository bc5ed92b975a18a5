"""Lowering of a quantized model to an integer program."""

from vitquant.lowering.lower import lower
from vitquant.lowering.promise import check_possible, check_promise, promised

__all__ = ["check_possible", "check_promise", "lower", "promised"]

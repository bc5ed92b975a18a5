"""From a quantized model to an integer program."""

from vitquant.lowering.lower import lower

__all__ = ["lower"]

"""Quantized models: what they are, their files, and what they mean without float32's rounding."""

from vitquant.model.quantized import QuantizedModel, Record

__all__ = ["QuantizedModel", "Record"]

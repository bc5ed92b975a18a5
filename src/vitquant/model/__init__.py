"""Quantized models, their files, and their simulation in float64 without float32's rounding."""

from vitquant.model.quantized import QuantizedModel, Record

__all__ = ["QuantizedModel", "Record"]

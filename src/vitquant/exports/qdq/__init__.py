"""Quantized models as ONNX with QuantizeLinear and DequantizeLinear (QDQ)."""

from vitquant.exports.qdq.model import FORMAT, onnx_qdq_model

__all__ = ["FORMAT", "onnx_qdq_model"]

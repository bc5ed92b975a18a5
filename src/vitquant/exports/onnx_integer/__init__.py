"""Integer programs as ONNX models of standard integer operators."""

from vitquant.exports.onnx_integer.model import DTYPES, FORMAT, onnx_integer_model

__all__ = ["DTYPES", "FORMAT", "onnx_integer_model"]

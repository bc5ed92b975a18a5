"""Integer programs: quantized models without any floating-point operation."""

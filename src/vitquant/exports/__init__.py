"""Export of quantized models to the formats of other runtimes."""

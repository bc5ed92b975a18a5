"""Reports about a quantized model, as data and as tables."""

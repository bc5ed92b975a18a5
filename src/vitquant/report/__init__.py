"""What a quantized model is and does, as data, and that data as tables."""

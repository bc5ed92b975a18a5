"""vitquant: quantize Vision Transformers, and run the result in integers."""

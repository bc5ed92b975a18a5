"""Integer programs: what a quantized model is when nothing of it is floating point any more."""

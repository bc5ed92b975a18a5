"""Loss landscapes: the loss of a quantized model along lines through the scales of one of its blocks."""

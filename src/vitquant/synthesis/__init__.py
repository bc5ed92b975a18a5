"""Images for a model, made from the model alone."""

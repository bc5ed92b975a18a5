"""What the models are for: data, preprocessing and metrics."""

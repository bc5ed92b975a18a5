"""The tasks of models: data, preprocessing and metrics."""

"""Published methods, one idea per file: plain functions `(model, data, settings) -> Record`."""

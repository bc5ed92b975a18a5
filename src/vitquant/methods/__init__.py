"""Published methods, one per file: plain functions `(model, context, settings) -> Record`."""

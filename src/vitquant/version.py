"""The version: pyproject.toml reads it here, and so does whatever says it."""

__version__ = "0.1.0"

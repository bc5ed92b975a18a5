"""Conformance vectors: small programs with inputs and expected outputs, for authors of engines."""

from vitquant.conformance.vectors import all_vectors, write_vectors

__all__ = ["all_vectors", "write_vectors"]

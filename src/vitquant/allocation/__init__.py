"""Bits for each part of a model: how sensitive it is, what bits cost there, and the best of all ways to spend them."""

"""Runtimes for integer programs and for exported files."""

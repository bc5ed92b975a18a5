"""Processes, here or on a Ray cluster, that compute parts of long work."""

"""A trained model with its images, small enough to carry, for a first look at every recipe."""

from vitquant.demo.embedded import PREPROCESSING, batches, check_folder, model, source, write_folder
from vitquant.demo.plan import estimated_seconds

__all__ = ["PREPROCESSING", "batches", "check_folder", "estimated_seconds", "model", "source", "write_folder"]

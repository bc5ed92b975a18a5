"""A trained model with its images, small enough to carry, for a first look at every recipe."""

from vitquant.demo.embedded import PREPROCESSING, batches, folder_of_images, model, source, write_folder
from vitquant.demo.plan import estimated_seconds

__all__ = ["PREPROCESSING", "batches", "estimated_seconds", "folder_of_images", "model", "source", "write_folder"]

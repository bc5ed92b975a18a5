"""A trained model with images, small enough to ship in the package, to try every recipe on."""

from vitquant.demo.embedded import PREPROCESSING, batches, folder_of_images, model, source, write_folder
from vitquant.demo.plan import estimated_seconds

__all__ = ["PREPROCESSING", "batches", "estimated_seconds", "folder_of_images", "model", "source", "write_folder"]

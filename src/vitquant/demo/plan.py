"""An estimate of the time that a recipe takes, from the time of the float model."""

from __future__ import annotations

# In units of a float pass over the same images, calibration with percentile and omse takes 1.3 to 1.5, with minmax 1.1;
# evaluation takes 1.4 to 1.5 for the simulated model, plus 1 for the float model. Capturing, inserting quantizers and
# saving took 1.2 s. Measured with one thread of the machine of docs/results.md, under load, with batches of 32.
CALIBRATION, EVALUATION, CAPTURE_SECONDS = 1.5, 2.5, 1.5


def estimated_seconds(relative_cost: int, calibration_images: int, test_images: int, seconds_per_image: float) -> float:
    """The time in seconds to capture, calibrate, and evaluate together with the float model.

    Arguments:
        relative_cost: the recipe's `relative_cost`, in float passes over the calibration images.
        calibration_images, test_images: the number of images.
        seconds_per_image: the measured time of the float model on this machine.
    """
    images = CALIBRATION * relative_cost * calibration_images + EVALUATION * test_images
    return CAPTURE_SECONDS + images * seconds_per_image

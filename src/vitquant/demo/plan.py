"""How long a recipe will take, from how long the float model takes."""

from __future__ import annotations

# In float passes over the same images: percentile and omse calibrate in 1.3 to 1.5, minmax in 1.1; the simulated model
# answers in 1.4 to 1.5, and the float model runs beside it. Capturing, inserting and saving took 1.2 s. One thread of
# the machine of docs/results.md, which was busy, batches of 32.
CALIBRATION, EVALUATION, CAPTURE_SECONDS = 1.5, 2.5, 1.5


def estimated_seconds(relative_cost: int, calibration_images: int, test_images: int, seconds_per_image: float) -> float:
    """The time to capture, calibrate, and evaluate beside the float model.

    Arguments:
        relative_cost: what the recipe declares, in float passes over the calibration images.
        calibration_images, test_images: how many there are.
        seconds_per_image: of the float model, here and now.
    """
    images = CALIBRATION * relative_cost * calibration_images + EVALUATION * test_images
    return CAPTURE_SECONDS + images * seconds_per_image

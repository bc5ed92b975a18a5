"""Signs that labels do not match a model's classes, judged by its predictions."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution
_PER_LABEL = 5  # images that a label needs before its most frequent prediction counts


def doubt(pairs: Mapping[tuple[int, int], int], classes: int, confidence: float) -> str | None:
    """Why top-1 may be misleading, in one line; None if there is no sign of it.

    There are three signs, the strongest first. *Another order*: images of one label are predicted as one class that is
    not the label, and different labels have different such classes. *Confidence*: predictions are right much less often
    than their probabilities suggest. *Chance*: top-1 is not significantly different from 1/classes.

    Arguments:
        pairs: the number of images for each (label, prediction).
        classes: the number of classes of the model.
        confidence: the mean probability of the predictions.

    Pitfall: for very few images there is no evidence, and the result is None.
    """
    images = sum(pairs.values())
    right = sum(count for (label, predicted), count in pairs.items() if label == predicted)
    if images == 0 or classes < 2:
        return None
    if moved := _moved(pairs):
        return (
            f"images of one label get one class, but another than their label ({moved}): the labels are in another "
            "order than the model's classes"
        )
    low, high = _score_limits(right, images)
    says = f"top-1 is {100 * right / images:.1f} %"
    if high < confidence / 2:
        return (
            f"{says}, while the model gives its classes a probability of {100 * confidence:.0f} % in the mean: are the "
            "labels in the order of the model's classes, and is the preprocessing its own?"
        )
    if low <= 1 / classes and high <= 1 / classes + 0.2:
        return (
            f"{says}, near chance ({100 / classes:.1f} %): labels in another order than the model's classes, weights "
            "of another model or untrained, or another preprocessing than it was trained with"
        )
    return None


def _moved(pairs: Mapping[tuple[int, int], int]) -> str:
    """Up to three labels with the other class that their images get, if that fits the predictions far better."""
    predictions: dict[int, Counter[int]] = defaultdict(Counter)
    for (label, predicted), count in pairs.items():
        predictions[label][predicted] += count
    counted = {label: each for label, each in predictions.items() if each.total() >= _PER_LABEL}
    images = sum(each.total() for each in counted.values())
    usual = {label: max(each, key=lambda key: (each[key], -key)) for label, each in counted.items()}
    agree = sum(counted[label][predicted] for label, predicted in usual.items())
    right = sum(each[label] for label, each in counted.items())
    others = {label: predicted for label, predicted in usual.items() if label != predicted}
    distinct = len(set(usual.values()))  # a model that predicts one class for all images is no evidence
    if len(usual) < 2 or 2 * distinct <= len(usual) or 2 * agree <= images or agree - right <= images / 4:
        return ""
    first = sorted(others, key=lambda label: (-counted[label][others[label]], label))[:3]
    return ", ".join(f"label {label}: class {others[label]}" for label in first)


def _score_limits(right: int, images: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion."""
    share, z2 = right / images, Z95**2 / images
    middle = share + z2 / 2
    width = math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return max(0.0, (middle - width) / (1 + z2)), min(1.0, (middle + width) / (1 + z2))

"""Evaluation says when labels and classes do not belong together, and is silent when they do."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitquant.tasks.classification import compare
from vitquant.tasks.doubt import doubt

FEW = settings(max_examples=40, deadline=None)

ORDER, SURE, CHANCE = "in another order", "gives its classes a probability", "near chance"


def result(labels, predicted, classes, confidence=0.9):
    """The doubt about predictions with a given probability."""
    odds = confidence / (1 - confidence) * (classes - 1)
    logits = torch.nn.functional.one_hot(torch.as_tensor(predicted), classes) * float(np.log(odds))
    return compare(logits, None, torch.as_tensor(labels)).doubt


@FEW
@given(st.integers(2, 40), st.integers(1, 12), st.floats(0.55, 0.99), st.integers(0, 10**6))
def test_a_classifier_as_good_as_it_says_is_not_doubted(classes, each, accuracy, seed):
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    right = np.arange(len(labels)) < np.ceil(accuracy * len(labels))
    generator.shuffle(right)
    predicted = np.where(right, labels, generator.integers(0, classes, len(labels)))
    pairs = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    said = doubt(pairs, classes, accuracy)
    assert said is None or (CHANCE in said and classes <= 3)  # a coin is right half of the time as well


@FEW
@given(st.integers(5, 30), st.integers(5, 10), st.integers(0, 10**6))
def test_labels_in_another_order_are_told(classes, each, seed):
    generator = np.random.default_rng(seed)
    order = generator.permutation(classes)
    labels = np.repeat(np.arange(classes), each)
    share = float((order == np.arange(classes)).mean())
    said = result(order[labels], labels, classes)
    assert (ORDER in (said or "")) == (share < 0.75)


def test_the_labels_that_moved_are_named():
    labels = np.repeat([0, 1, 2, 3], 6)
    said = result(labels, np.repeat([0, 7, 8, 9], 6), 10)
    assert "(label 1: class 7, label 2: class 8, label 3: class 9)" in said


def test_one_class_for_every_image_is_no_other_order():
    said = result(np.repeat(np.arange(10), 10), np.zeros(100, int), 10, confidence=0.12)
    assert CHANCE in said


def test_one_image_of_each_class_is_doubted_by_confidence():
    labels = np.arange(200)
    assert SURE in result(labels, (labels + 1) % 200, 1000, confidence=0.8)
    assert result(labels, labels, 1000, confidence=0.8) is None


def test_chance_is_told_of_few_and_of_many_classes():
    images = np.arange(300)
    for classes in (2, 10, 1000):
        labels, predicted = images % classes, images // classes % classes
        said = result(labels, predicted, classes, confidence=1 / classes + 0.01)
        assert f"near chance ({100 / classes:.1f} %)" in said


def test_of_a_handful_of_images_nothing_is_said():
    assert result([0, 1, 2, 3], [1, 1, 2, 0], 6, confidence=0.4) is None
    assert doubt({}, 10, 0.5) is None


def test_the_float_model_is_the_judge():
    labels = torch.arange(10).repeat(10)
    right = torch.nn.functional.one_hot(labels, 10) * 9.0
    assert ORDER in compare(right, right.roll(1, 1), labels).doubt
    assert compare(right.roll(1, 1), right, labels).doubt is None
    sure = torch.nn.functional.one_hot(torch.arange(200), 1000) * 9.0  # one image a label
    assert SURE in compare(sure / 1000, sure, torch.arange(200) + 1).doubt
    assert CHANCE in compare(sure, sure / 1000, torch.arange(200) + 1).doubt


@pytest.mark.parametrize("kind", ["right", "text", "shifted", "sorted subset"])
def test_real_photographs_with_real_logits(shared, kind):
    """Labels as by folders `0` to `999` sorted as text, counted from 1, or of the classes present only."""
    from vitquant.tasks.images import load_listing

    labels = np.array([item.label for item in load_listing(shared / "images" / "photos_eval")])
    with np.load(shared / "reference" / "logits" / "fp32.npz") as file:
        logits = torch.from_numpy(file["logits"].astype(np.float32))
    names = sorted(str(index) for index in range(1000))
    present = sorted(set(labels.tolist()))
    wrong = {
        "right": labels,
        "text": np.array([names.index(str(label)) for label in labels]),
        "shifted": (labels + 1) % 1000,
        "sorted subset": np.array([present.index(label) for label in labels]),
    }[kind]
    found = compare(logits, None, torch.from_numpy(wrong))
    if kind == "right":
        assert found.doubt is None
        assert found.top1 > 85
    else:
        assert found.top1 < 6
        assert found.doubt is not None

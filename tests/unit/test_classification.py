import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vitquant.errors import DataError, ModelError
from vitquant.tasks.classification import ClassificationResult, compare, evaluate, logits_of, paired_interval
from vitquant.tasks.images import Item, batches, load_listing
from vitquant.tasks.preprocessing import Preprocessing
from vitquant.zoo import ModelSource, create

CORRECT = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def outcomes(n, only_a, only_b):
    """Correctness of two models on n images, in counts."""
    a = [True] * only_a + [False] * (n - only_a)
    b = [False] * only_a + [True] * only_b + [False] * (n - only_a - only_b)
    return a, b


def score(n, only_a, only_b, d):
    """|score statistic| at difference d, its nuisance probability found by brute force, not by the formula."""
    p_b = np.linspace(max(0, -d), (1 - d) / 2, 200_001)[1:-1]
    likelihood = (n - only_a - only_b) * np.log(np.maximum(1 - 2 * p_b - d, 1e-300))
    likelihood = likelihood + only_a * np.log(p_b + d) + only_b * np.log(p_b)
    p = p_b[likelihood.argmax()]
    return abs(only_a - only_b - n * d) / math.sqrt(n * (2 * p + d - d * d))


def test_the_interval_is_the_published_one():
    # Fagerland, Lydersen, Laake, "Recommended tests and confidence intervals for paired binomial
    # proportions", Statistics in Medicine 33 (2014): 1 and 7 of 21 discordant, Tango's interval
    assert paired_interval(*outcomes(21, 1, 7)) == pytest.approx((-51.7, -2.6), abs=0.05)


@pytest.mark.parametrize("counts", [(500, 13, 12), (500, 3, 0), (40, 10, 2), (20, 1, 1), (500, 60, 90)])
def test_at_both_ends_the_score_test_just_rejects(counts):
    for end in paired_interval(*outcomes(*counts)):
        assert score(*counts, end / 100) == pytest.approx(1.96, abs=2e-3)


def test_the_interval_holds_the_truth_about_95_times_in_100():
    n, p_a, p_b = 40, 0.12, 0.06  # exact: every possible outcome with its probability
    covered = 0.0
    for only_a, only_b in itertools.product(range(n + 1), repeat=2):
        if only_a + only_b <= n:
            rest = n - only_a - only_b
            ways = math.comb(n, only_a) * math.comb(n - only_a, only_b)
            probability = ways * p_a**only_a * p_b**only_b * (1 - p_a - p_b) ** rest
            if probability > 1e-9:
                low, high = paired_interval(*outcomes(n, only_a, only_b))
                covered += probability * (low <= 100 * (p_a - p_b) <= high)
    assert 0.93 < covered < 0.98


@given(CORRECT)
def test_the_interval_contains_the_difference_and_is_symmetric(pairs):
    a, b = zip(*pairs, strict=True)
    low, high = paired_interval(a, b)
    assert -100 <= low <= 100 * (sum(a) - sum(b)) / len(pairs) <= high <= 100
    assert low < high  # never the zero width of Wald's interval when nothing differs
    assert paired_interval(b, a) == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.parametrize(("a", "b"), [([], []), ([True], [True, False])])
def test_an_interval_of_nothing_or_unequal_lengths_is_refused(a, b):
    with pytest.raises(DataError, match="paired interval"):
        paired_interval(a, b)


def test_the_figures_of_a_small_case_by_hand():
    labels = torch.tensor([0, 1, 2, 3])
    logits = torch.tensor(
        # top-1 right, right, wrong (second), wrong (sixth)
        [[9, 1, 2, 3, 4, 5], [0, 9, 2, 3, 4, 5], [9, 0, 8, 1, 2, 3], [9, 8, 7, 1, 6, 5]]
    ).float()
    reference = logits[[0, 2, 2, 0]]  # classes 0, 0, 0, 0: right, wrong, wrong, wrong
    result = compare(logits, reference, labels, engine="integer", seconds=2.5)
    assert dataclasses.asdict(result) == {
        "engine": "integer",
        "images": 4,
        "top1": 50.0,
        "top5": 75.0,
        "float_top1": 25.0,
        "agreement": 75.0,
        "top1_difference_interval": paired_interval([True, True, False, False], [True, False, False, False]),
        "seconds": 2.5,
        "doubt": None,
    }


def test_fewer_than_five_classes_count_all_of_them():
    assert compare(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), None, torch.tensor([0, 1])).top5 == 100.0


def test_without_a_float_model_its_figures_are_none():
    result = compare(torch.eye(3), None, torch.arange(3))
    assert (result.float_top1, result.agreement, result.top1_difference_interval) == (None, None, None)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_refused(label):
    with pytest.raises(DataError, match=f"class index {label} .*3 classes"):
        compare(torch.eye(3), None, torch.tensor([0, 1, label]))


class Table(nn.Module):
    """Gives row `int(pixel)` of a table; wrong in training mode."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.inner = nn.Dropout(1.0)

    def forward(self, images):
        return self.inner(self.rows[images[:, 0, 0, 0].long()])


def stream(order, size):
    images = torch.tensor(order, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2)
    return zip(images.split(size), torch.tensor(order).split(size), strict=True)


def test_batches_give_the_figures_of_the_whole_whatever_their_size():
    torch.manual_seed(0)
    rows, reference, order = torch.randn(20, 20) + torch.eye(20), torch.randn(20, 20) + torch.eye(20), [*range(20)] * 2
    expected = compare(rows[order], reference[order], torch.tensor(order))
    assert 0 < expected.top1 < expected.top5 < 100
    for size in (1, 7, 40):
        seen = []
        told = lambda _, done, total, seen=seen: seen.append(done)  # noqa: E731
        result = evaluate(Table(rows), Table(reference), stream(order, size), told)
        assert dataclasses.replace(result, seconds=0.0) == expected
        assert result.seconds > 0
        assert seen[-1] == 40
        assert len(seen) == math.ceil(40 / size)


def test_the_models_run_in_eval_mode_without_gradients_and_are_given_back_as_they_were():
    model, gradients = Table(torch.eye(4)), []
    model.rows.register_hook(gradients.append)
    model.train()
    model.inner.eval()
    model.register_forward_hook(lambda *_: gradients.append(1) if torch.is_grad_enabled() else None)
    assert evaluate(model, None, stream([0, 1, 2, 3], 2)).top1 == 100.0
    assert (model.training, model.inner.training, gradients) == (True, False, [])
    with pytest.raises(ModelError):
        evaluate(model, Table(torch.eye(5)), stream([0, 1], 1))
    assert (model.training, model.inner.training) == (True, False)


def test_any_callable_and_any_library_output_will_do():
    class Output:
        logits = torch.eye(3)

    assert logits_of(Output()) is Output.logits
    assert logits_of({"logits": Output.logits}) is Output.logits
    assert logits_of((Output.logits, None)) is Output.logits
    with pytest.raises(ModelError, match=r"tuple.*\.logits"):
        logits_of((torch.eye(3), torch.eye(3)))
    result = evaluate(lambda images: Output(), lambda images: torch.eye(3).int(), stream([0, 1, 2], 3), engine="onnx")
    assert result == ClassificationResult(
        "onnx", 3, 100.0, 100.0, 100.0, 100.0, paired_interval([True] * 3, [True] * 3), result.seconds
    )


def test_logits_that_are_not_finite_are_refused_and_the_image_is_named(tmp_path):
    from PIL import Image

    items = []
    for i in range(4):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (8, 8), (i, i, i)).save(path)
        items.append(Item(path, i))
    items[0].path.write_text("not an image")
    rows = torch.eye(4)
    rows[3, 1] = float("inf")
    plain = Preprocessing((3, 8, 8), crop_pct=1.0, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
    good = batches(items, plain, 2, skip_bad_images=True)
    with pytest.raises(ModelError, match=r"the model gives NaN or infinite logits.*3\.png"):
        evaluate(Table(rows + 0.01), None, good)
    with pytest.raises(ModelError, match=r"the float model .*image 3"):
        evaluate(Table(torch.eye(4)), Table(rows), stream([0, 1, 2, 3], 3))


@pytest.mark.parametrize("output", [torch.eye(4)[:2], torch.ones(3)])
def test_logits_of_another_shape_are_refused(output):
    with pytest.raises(ModelError, match="logits of shape"):
        evaluate(lambda images: output, None, stream([0, 1, 2], 3))


def test_a_float_model_of_other_classes_is_refused():
    with pytest.raises(ModelError, match="logits of 3 classes, the float model of 4"):
        evaluate(lambda images: torch.eye(3), lambda images: torch.ones(3, 4), stream([0, 1, 2], 3))


def test_no_images_is_an_error():
    with pytest.raises(DataError, match="no images"):
        evaluate(Table(torch.eye(3)), None, [])


def test_the_real_float_model_gives_the_references_classes(shared):
    name, weights = "timm:deit_tiny_patch16_224", str(shared / "weights" / "deit_tiny_patch16_224.safetensors")
    model = create(ModelSource(name, weights=weights))
    items = load_listing(shared / "images" / "photos_eval")[:50]
    with np.load(shared / "reference" / "logits" / "fp32.npz") as file:
        reference = torch.from_numpy(file["logits"][:50].astype(np.float32))
    rows = iter(reference.split(25))
    result = evaluate(model, lambda images: next(rows), batches(items, Preprocessing(), 25))
    assert result.agreement == 100.0
    assert result.top1 == result.float_top1
    assert 80 < result.top1 < 95


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("classes", [2, 10, 17, 100, 1000])
def test_of_equal_logits_the_lower_class_counts(classes, dtype):
    """Integer logits tie often; which class wins must not depend on the engine, the device or a sorting algorithm."""
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randint(0, 4, (20, classes), generator=generator).to(dtype)
    order = [sorted(range(classes), key=lambda index: (-row[index], index)) for row in logits.tolist()]
    for place in range(min(7, classes)):
        labels = torch.tensor([ranks[place] for ranks in order])
        result = compare(logits, None, labels)
        assert (result.top1, result.top5) == (100.0 * (place == 0), 100.0 * (place < 5))
    first = torch.nn.functional.one_hot(torch.tensor([ranks[0] for ranks in order]), classes)
    result = compare(first, logits, first.argmax(dim=1))
    assert (result.float_top1, result.agreement) == (100.0, 100.0)


def test_a_model_without_a_head_is_not_evaluated():
    model = Table(torch.eye(4))
    model.head = nn.Identity()
    for models in ((model, None), (lambda images: torch.eye(4)[images[:, 0, 0, 0].long()], model)):
        with pytest.raises(ModelError, match="features, not classes"):
            evaluate(*models, stream([0, 1], 2))

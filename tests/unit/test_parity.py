"""Promises about forms of a model hold when they should, and break when they should."""

import importlib
import io
import json
from dataclasses import replace

import pytest
import timm
import torch
from rich.console import Console

import vitquant
from vitquant.lowering import lower
from vitquant.parity import Flips, Form, ParityReport, examine
from vitquant.parity.comparison import as_close_as, bit_exact, same_answers
from vitquant.parity.comparison import compare as compare_outputs
from vitquant.parity.examine import adversarial_codes
from vitquant.report.parity import as_dict, comparisons_table, verdict
from vitquant.runtime.interpreter import Interpreter
from vitquant.runtime.products import exact_int64
from vitquant.tasks.classification import same_classes

LOGITS = torch.randn(100, 10, generator=torch.Generator().manual_seed(0))


def compare(form, logits, beside, reference):
    """Two forms of a classifier."""
    return compare_outputs(form, {"output": logits}, beside, {"output": reference}, same_classes)


def near(cosine):
    """Logits with about that cosine to `LOGITS`."""
    other = torch.randn(100, 10, generator=torch.Generator().manual_seed(1))
    return cosine * LOGITS + (1 - cosine**2) ** 0.5 * other


def test_bits_are_the_same_or_the_promise_is_broken():
    assert bit_exact(compare("a", LOGITS, "b", LOGITS.clone())).kept
    changed = LOGITS.clone()
    changed[7, 3] = torch.nextafter(changed[7, 3], torch.tensor(10.0))
    one = bit_exact(compare("a", changed, "b", LOGITS))
    assert (one.kept, one.identical, one.agreement) == (False, 99, 100)


def test_classes_are_counted_and_ties_go_to_the_first():
    swapped = LOGITS.clone()
    swapped[:3] = -swapped[:3]
    found = same_answers(compare("a", swapped, "b", LOGITS))
    assert (found.agreement, found.kept) == (97, False)
    swapped[0] = LOGITS[0]
    assert same_answers(compare("a", swapped, "b", LOGITS)).kept
    assert same_answers(compare("a", swapped[1:3], "b", LOGITS[1:3])).kept is False
    assert same_answers(compare("a", swapped[2:18], "b", LOGITS[2:18])).kept  # one of 16
    ties = torch.zeros(4, 3)
    assert compare("a", ties, "b", ties).agreement == 100


def test_of_several_outputs_the_worst_one_counts():
    other, apart = torch.ones(100, 2, 3), torch.ones(100, 2, 3)
    apart[5, 0] = 0.5
    found = compare_outputs("a", {"x": LOGITS, "map": apart}, "b", {"x": LOGITS, "map": other}, None)
    assert (found.agreement, found.identical, found.worst) == (None, 99, 0.5)
    assert 0.999 < found.cosine < 1
    apart[:] = torch.nan
    found = compare_outputs("a", {"map": apart, "x": LOGITS}, "b", {"map": other, "x": LOGITS}, None)
    assert not as_close_as(found, None).kept
    assert not bit_exact(found).kept


@pytest.mark.parametrize(
    ("usual", "found", "kept"),
    [(0.97, 0.97, True), (0.97, 0.8, False), (0.9, 0.8, True), (0.3, 0.6, True), (0.3, 0.1, False), (None, 0.8, False)],
)
def test_rounding_explains_so_much_and_no_more(usual, found, kept):
    reference = None if usual is None else replace(compare("s", LOGITS, "f", LOGITS), cosine=usual)
    assert as_close_as(replace(compare("a", LOGITS, "s", LOGITS), cosine=found), reference).kept is kept


def test_logits_that_are_no_numbers_break_every_promise_and_are_null_in_json():
    broken = LOGITS.clone()
    broken[0] = torch.nan
    comparisons = [
        promise(compare("a", broken, "b", LOGITS)) for promise in (bit_exact, lambda c: as_close_as(c, None))
    ]
    assert not any(each.kept for each in comparisons)
    values = json.loads(json.dumps(as_dict(ParityReport(tuple(comparisons))), allow_nan=False))
    assert values["comparisons"][0]["worst"] is None
    assert len(values["broken"]) == 2


def test_no_word_of_the_table_is_broken_in_80_columns():
    form = "onnxruntime, onnx-integer, not optimized, random codes"
    apart = replace(compare(form, -LOGITS, "integer program", LOGITS), worst=1.23e-5)
    pairs = [bit_exact(apart), same_answers(replace(apart, beside="float64 simulation")), as_close_as(apart, None)]
    console = Console(width=80, file=io.StringIO())
    console.print(comparisons_table(pairs))
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    words = " ".join([form, "integer program", "float64 simulation", "1.23e-05", *(each.promise for each in pairs)])
    assert {*words.split(), "broken"} <= set(shown.replace(":", "").split())


def test_the_verdict_says_kept_only_of_what_was_promised():
    alone = compare("simulation", LOGITS, "float model", LOGITS)
    assert str(verdict(ParityReport((alone,), refused="a: why"))) == "not lowered: a: why\nnothing was promised"
    assert str(verdict(ParityReport((alone, bit_exact(alone))))) == "every promise is kept"


@pytest.mark.parametrize(
    ("made_by", "flipped", "largest", "kept"),
    [
        ("rescaling", 0, 0, True),
        ("rescaling", 10, 1, True),
        ("rescaling", 11, 1, False),
        ("rescaling", 1, 2, False),
        ("softmax", 0, 0, True),
        ("activation", 1, 1, False),
    ],
)
def test_flips_of_rescaling_are_few_and_of_operations_none(made_by, flipped, largest, kept):
    flips = Flips("a:input", made_by, 10_000, flipped, largest)
    assert flips.kept is kept
    assert bool(ParityReport((), (flips,)).broken) is not kept


def test_one_code_of_few_may_flip():
    assert Flips("a:input", "rescaling", 867, 1, 1).kept
    assert not Flips("a:input", "rescaling", 867, 2, 1).kept


# What is examined.


@pytest.fixture(scope="module")
def tiny():
    """A tiny float model, what `fq-vit` makes of it, its program, and images."""
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 10}
    model = timm.models.vision_transformer.VisionTransformer(**sizes).eval()
    images = [torch.randn(8, 3, 16, 16) for _ in range(2)]
    quantized = vitquant.quantize(model, "fq-vit", images)
    return model, quantized, lower(quantized), images


def test_codes_that_no_image_has_are_the_smallest_the_largest_and_all(tiny):
    program = tiny[2]
    codes = adversarial_codes(program)
    assert {name: sorted(set(values.flatten().tolist())) for name, values in codes.items()} == {
        "all 0": [0],
        "all 255": [255],
        "random codes": list(range(256)),
    }
    assert all(values.shape[1:] == program.registers["input"].shape[1:] for values in codes.values())


@pytest.mark.parametrize("where", ["all 0", "all 255", "random codes"])
def test_a_form_that_is_wrong_on_codes_that_no_image_has_is_found(tiny, where):
    _, model, program, images = tiny
    run, codes = Interpreter(program), adversarial_codes(program)[where]
    form = Form("mine", lambda x: run(x) + torch.equal(x, codes), exact=True, on_codes=True)
    assert examine(model, images, [form]).broken == [f"mine, {where} beside integer program: bit for bit"]


def test_every_form_has_the_promise_that_it_can_keep(tiny, monkeypatch):
    float_model, model, program, images = tiny
    products = []

    class Spy(Interpreter):
        def __init__(self, program, *given):
            products.extend(given)
            super().__init__(program, *given)

    monkeypatch.setattr(importlib.import_module("vitquant.parity.examine"), "Interpreter", Spy)
    forms = [
        Form("exact", Interpreter(program), exact=True, on_codes=True),
        Form("near", lambda x: model(x) * 2, exact=False),
    ]
    report = examine(model, images, forms, float_model, same=same_classes)
    promises = {(each.form, each.beside): each.promise for each in report.comparisons if each.promise}
    usual = report.comparisons[0]
    assert (usual.form, usual.beside) == ("simulation", "float model")
    assert promises.pop(("near", "simulation")) == as_close_as(usual, usual).promise != as_close_as(usual, None).promise
    assert promises.pop(("integer program", "float64 simulation")) == "at least 98 % agree, or all but 1"
    assert set(promises.values()) == {"bit for bit"}
    assert {form for form, _ in promises} >= {"exact", "int64 definition"}
    assert report.broken == []
    assert products == [exact_int64]
    without = examine(model, images, forms, float_model)
    assert {each.agreement for each in without.comparisons} == {None}
    (rounded,) = [c for c in without.comparisons if (c.form, c.beside) == ("integer program", "float64 simulation")]
    assert (rounded.promise, rounded.kept) == (as_close_as(usual, usual).promise, True)

"""ONNX graphs of integer formulas against `vitquant.integer`: in ONNX Runtime, optimized or not, and onnx.reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from vitquant.exports.onnx_integer import arithmetic as onnx_arithmetic
from vitquant.exports.onnx_integer import operations as onnx_operations
from vitquant.exports.onnx_integer.builder import Graph, Value
from vitquant.integer import arithmetic, layer_norm, softmax
from vitquant.integer.exponential import exact_exponential
from vitquant.runtime.onnxruntime import OnnxModel

law = settings(max_examples=60, deadline=None)

AROUND = st.integers(-1, 1)
# Two words side by side: comparisons of int64 go wrong, where they do, when the upper ones are equal.
WORDS = st.builds(lambda high, low: (high << 32) + low, st.integers(-3, 3), st.integers(0, 2**32 - 1))
ANY = st.integers(-(2**63), 2**63 - 1) | WORDS | st.integers(-40, 40) | st.sampled_from([-(2**63), 2**63 - 1])
POSITIVE = (
    st.integers(1, 2**62 - 1)
    | st.builds(lambda root, more: root * root + more, st.integers(1, 2**31 - 1), AROUND)
    | st.builds(lambda power, more: 2**power + more, st.integers(0, 61), AROUND)
).map(lambda x: min(max(x, 1), 2**62 - 1))


def many(values: st.SearchStrategy[int]) -> st.SearchStrategy[list[int]]:
    return st.lists(values, min_size=1, max_size=64)


class Everywhere:
    """A graph of one tensor in three runtimes, which must agree."""

    def __init__(self, build: Callable[[Value], Value], columns: int = 1) -> None:
        self.build, self.columns = build, columns

    @cached_property
    def runtimes(self) -> tuple[OnnxModel, OnnxModel, ReferenceEvaluator]:
        graph = Graph()
        x = graph.input("x", np.int64)
        y = graph.named(self.build(x), "y")
        model = graph.model((x, ["rows", self.columns]), [(y, ["rows", "columns"])], {}, "")
        content = model.SerializeToString()
        return OnnxModel(content, threads=1), OnnxModel(content, optimize=False, threads=1), ReferenceEvaluator(model)

    def __call__(self, x: Tensor) -> Tensor:
        optimized, plain, reference = self.runtimes
        (expected,) = reference.run(None, {"x": x.numpy()})
        np.testing.assert_array_equal(optimized(x).numpy(), expected)
        np.testing.assert_array_equal(plain(x).numpy(), expected)
        return torch.from_numpy(np.asarray(expected).astype(np.int64))


def column(values: Sequence[int]) -> Tensor:
    return torch.tensor(values)[:, None]


BIT_LENGTH = Everywhere(onnx_arithmetic.bit_length)
SQUARE_ROOT = Everywhere(onnx_arithmetic.square_root)
LOGARITHMS = {bits: Everywhere(lambda x, bits=bits: onnx_arithmetic.logarithm(x, bits)) for bits in (0, 1, 12, 14)}
FLOORS = {digits: Everywhere(lambda x, d=digits: onnx_arithmetic.shift_floor(x, d)) for digits in (1, 31, 34, 62, 63)}
NEAREST = {digits: Everywhere(lambda x, d=digits: onnx_arithmetic.shift_right(x, d)) for digits in (1, 2, 34, 60)}
CLAMPS = {
    key: Everywhere(lambda x, key=key: onnx_arithmetic.shift_clamped(x, *key))
    for key in ((1, 0, 255), (30, -128, 127), (31, 0, 15), (32, -8, 7), (40, 0, 255), (61, -1, 0))
}


@law
@given(many(POSITIVE | st.integers(0, 2**63 - 1)))
def test_bit_length(values: list[int]) -> None:
    assert torch.equal(BIT_LENGTH(column(values)), arithmetic.bit_length(column(values)))


@law
@given(many(POSITIVE))
def test_square_root(values: list[int]) -> None:
    assert torch.equal(SQUARE_ROOT(column(values)), arithmetic.square_root(column(values)))


def test_square_root_of_every_small_number_and_of_the_ends_of_its_range() -> None:
    ends = [*(2**62 - 1 - k for k in range(100)), (2**31 - 1) ** 2, (2**31 - 1) ** 2 - 1]
    values = column([*range(1, 2**14), *ends])
    assert torch.equal(SQUARE_ROOT(values), arithmetic.square_root(values))


@law
@given(many(st.integers(1, 2**31 - 1) | st.integers(1, 300)), st.sampled_from(sorted(LOGARITHMS)))
def test_logarithm(values: list[int], bits: int) -> None:
    assert torch.equal(LOGARITHMS[bits](column(values)), arithmetic.logarithm(column(values), bits))


@law
@given(many(ANY), st.sampled_from(sorted(FLOORS)))
def test_shift_floor_of_any_number(values: list[int], digits: int) -> None:
    assert torch.equal(FLOORS[digits](column(values)), column(values) >> digits)


@law
@given(many(st.integers(-(2**61), 2**61) | WORDS | st.integers(-40, 40)), st.sampled_from(sorted(NEAREST)))
def test_shift_right_rounds_halves_up(values: list[int], digits: int) -> None:
    assert torch.equal(NEAREST[digits](column(values)), arithmetic.shift_right(column(values), digits))


@law
@given(many(ANY | st.integers(-600, 600)), st.sampled_from(sorted(CLAMPS)))
def test_shift_clamped_of_any_number(values: list[int], key: tuple[int, int, int]) -> None:
    digits, low, high = key
    near = [value << (digits - 1) for value in (2 * low - 1, 2 * low, 2 * high + 1, 2 * high + 2)]
    x = column([*values, *near, *(value - 1 for value in near)])
    assert torch.equal(CLAMPS[key](x), (x >> digits).clamp(low, high))


def test_a_minimum_of_int64_is_refused_because_onnx_runtime_has_it_wrong() -> None:
    x = Graph().input("x", np.int64)
    for wrong in (lambda: x.minimum(0), lambda: x.maximum(0), lambda: x.clip(0, 1), x.largest):
        with pytest.raises(AssertionError, match="int64"):
            wrong()


# LayerNorm and softmax

CHANNELS, LARGEST, EPSILON = 24, 2040, 300
NORMALIZE = Everywhere(lambda x: onnx_operations.normalize(x, CHANNELS, EPSILON, LARGEST), CHANNELS)
TABLE = exact_exponential(0.04)
ROW = 5


def softmax_of(form: Callable[..., Value], hidden: Tensor | None = None) -> Everywhere:
    """A softmax of rows of codes, as a graph."""

    def build(x: Value) -> Value:
        values, octaves = (x.graph.constant(table, np.int32) for table in (TABLE.values, TABLE.octaves))
        mask = None if hidden is None else x.graph.constant(hidden, bool)
        return form(onnx_operations.distances(x.cast(np.int32), mask, TABLE.masked), values, octaves)

    return Everywhere(build, ROW)


HIDDEN = torch.tensor([True, False, True, False, False])
FORMS = {
    "log": (
        lambda d, values, octaves: onnx_operations.softmax_to_powers(d, values, octaves, 15),
        lambda d: softmax.log_int_softmax(d, TABLE, 15),
    ),
    "roots": (
        lambda d, values, octaves: onnx_operations.softmax_to_powers(d, values, octaves, 31, 2),
        lambda d: softmax.log_int_softmax(d, TABLE, 31, 2),
    ),
    "roots below 1": (
        lambda d, values, octaves: onnx_operations.softmax_to_powers(d, values, octaves, 31, 2, -7321),
        lambda d: softmax.log_int_softmax(d, TABLE, 31, 2, -7321),
    ),
    "published": (
        lambda d, values, _: onnx_operations.published_softmax_to_powers(d, values, 16),
        lambda d: softmax.published_log_int_softmax(d, TABLE, 16),
    ),
    "uniform": (
        lambda d, values, _: onnx_operations.softmax_to_levels(d, values, 2**31 - 9, 23),
        lambda d: softmax.integer_softmax(d, TABLE, 2**31 - 9, 23),
    ),
}
SOFTMAXES = {
    (name, masked): softmax_of(FORMS[name][0], mask)
    for name in FORMS
    for masked, mask in (("", None), ("masked", HIDDEN), ("all", torch.ones(ROW, dtype=torch.bool)))
}


def rows(low: int, high: int, width: int) -> st.SearchStrategy[Tensor]:
    row = st.lists(st.integers(low, high) | st.sampled_from([low, high]), min_size=width, max_size=width)
    return st.lists(row, min_size=1, max_size=20).map(torch.tensor)


@law
@given(rows(-LARGEST, LARGEST, CHANNELS))
def test_normalize(x: Tensor) -> None:
    x = torch.cat([x, torch.full((1, CHANNELS), LARGEST)])  # a constant row has no deviation
    assert torch.equal(NORMALIZE(x), layer_norm.normalize(x, EPSILON, LARGEST))


@pytest.mark.parametrize("key", SOFTMAXES)
@settings(max_examples=25, deadline=None)
@given(codes=rows(0, 255, ROW))
def test_softmax(key: tuple[str, str], codes: Tensor) -> None:
    hidden = {"": None, "masked": HIDDEN, "all": torch.ones(ROW, dtype=torch.bool)}[key[1]]
    expected = FORMS[key[0]][1](softmax.distances(codes, hidden, TABLE))
    assert torch.equal(SOFTMAXES[key](codes), expected)

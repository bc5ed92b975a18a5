"""A small builder of ONNX graphs: values with operators, so that integer formulas read as they do elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from vitquant.errors import ExportError
from vitquant.packing import pack

try:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
except ImportError as error:
    raise ExportError("writing ONNX needs onnx: pip install 'vitquant[onnx]'") from error

UINT4_OPSET = 21  # the first that has UINT4; before, 4-bit codes take a byte
LARGEST_MODEL = 2**31 - 1  # bytes that one protobuf message can have
_ROOM = 2**20  # for everything but constants, which are counted while they are added

Number = int | np.integer[Any]


@dataclass(frozen=True)
class Value:
    """A tensor of a graph; numbers beside an operator become constants of its dtype.

    Arguments:
        graph: that has it.
        name: in that graph.
        dtype: of its elements.
    """

    graph: Graph
    name: str
    dtype: np.dtype[Any]

    def __add__(self, other: Value | Number) -> Value:
        return self._with("Add", other)

    def __sub__(self, other: Value | Number) -> Value:
        return self._with("Sub", other)

    def __mul__(self, other: Value | Number) -> Value:
        return self._with("Mul", other)

    def __floordiv__(self, other: Value | Number) -> Value:
        """The floor of the quotient, of non-negative values only: ONNX rounds towards zero."""
        return self._with("Div", other)

    def __rshift__(self, digits: Value | Number) -> Value:
        """Without the last digits; of unsigned values only, as ONNX has it."""
        return self._with("BitShift", digits, direction="RIGHT")

    def at_least(self, other: Value | Number) -> Value:
        """Whether each element is >= the other: bool."""
        return self._with("GreaterOrEqual", other, dtype=bool)

    def where(self, then: Value | Number, otherwise: Value | Number) -> Value:
        """`then` where this bool is true, else `otherwise`; one of them a value."""
        dtype = next(each.dtype for each in (then, otherwise) if isinstance(each, Value))
        chosen = (each if isinstance(each, Value) else self.graph.scalar(each, dtype) for each in (then, otherwise))
        return self.graph.node("Where", self, *chosen, dtype=dtype)

    def minimum(self, other: Value | Number) -> Value:
        """The smaller of two; not of int64."""
        return self._orderly()._with("Min", other)

    def maximum(self, other: Value | Number) -> Value:
        """The larger of two; not of int64."""
        return self._orderly()._with("Max", other)

    def clip(self, low: int, high: int) -> Value:
        """Clamped to low..high; not of int64."""
        bounds = (self.graph.scalar(bound, self.dtype) for bound in (low, high))
        return self.graph.node("Clip", self._orderly(), *bounds)

    def cast(self, dtype: Any) -> Value:
        """The same numbers in another dtype; of integers that it cannot hold, the lowest bits."""
        dtype = np.dtype(dtype)
        if dtype == self.dtype:
            return self
        return self.graph.node("Cast", self, dtype=dtype, to=helper.np_dtype_to_tensor_dtype(dtype))

    def sum(self, axes: Sequence[int] = (-1,), keep: bool = True) -> Value:
        """The sum over some axes; of 32- or 64-bit integers."""
        return self.graph.node("ReduceSum", self, self.graph.shape(axes), keepdims=int(keep))

    def largest(self) -> Value:
        """The largest of the last axis, which becomes one; not of int64."""
        return self.graph.node("ReduceMax", self._orderly(), self.graph.shape((-1,)), keepdims=1)

    def entries(self, index: Value) -> Value:
        """The elements of this vector that `index` counts."""
        return self.graph.node("Gather", self, index, axis=0)

    def _orderly(self) -> Value:
        # ONNX Runtime 1.31 finds the wrong one of two int64 with the same upper half (its pull request 32475).
        assert self.dtype != np.int64, f"{self.graph.scope}: no minimum or maximum of int64; compare and choose"
        return self

    def _with(self, operator: str, other: Value | Number, **attributes: Any) -> Value:
        if not isinstance(other, Value):
            other = self.graph.scalar(other, self.dtype)
        return self.graph.node(operator, self, other, **attributes)


class Graph:
    """Collects nodes and constants; every value is written once.

    Arguments:
        opset: the version of ONNX's operators.
        ends: the names of inputs and outputs, which no other value gets.

    Attributes:
        scope: what names of nodes begin with.
    """

    def __init__(self, opset: int = UINT4_OPSET, ends: Iterable[str] = ()) -> None:
        self.scope, self.opset = "", opset
        self._taken = set(ends)
        self._nodes: list[NodeProto] = []
        self._constants: list[TensorProto] = []
        self._shapes: list[ValueInfoProto] = []
        self._scalars: dict[tuple[int, np.dtype[Any]], Value] = {}
        self._bytes = 0

    def node(self, operator: str, *inputs: Value, dtype: Any = None, **attributes: Any) -> Value:
        """The result of an operator; of the dtype of its first input unless said otherwise."""
        name = self._free(f"{self.scope}/{operator}.{len(self._nodes)}")
        self._nodes.append(helper.make_node(operator, [each.name for each in inputs], [name], name, **attributes))
        return Value(self, name, inputs[0].dtype if dtype is None else np.dtype(dtype))

    def named(self, value: Value, name: str) -> Value:
        """The result of the last node under another name; any other value under its own."""
        if not self._nodes or self._nodes[-1].output[0] != value.name:
            return value
        self._nodes[-1].output[0] = self._free(name)
        return replace(value, name=self._nodes[-1].output[0])

    def output(self, value: Value, name: str) -> Value:
        """A value under the name of an output."""
        self._nodes.append(helper.make_node("Identity", [value.name], [name], self._free(f"{self.scope}/{name}")))
        return replace(value, name=name)

    def describe(self, value: Value, shape: Sequence[int | str]) -> None:
        """Say what shape a value has where ONNX cannot infer it; sizes that depend on the batch are words."""
        self._shapes.append(_info(value, shape))

    def constant(self, values: Tensor | np.ndarray[Any, Any] | Sequence[int], dtype: Any) -> Value:
        """Numbers that are the same for every image."""
        array = np.asarray(values)
        stored = array.astype(dtype)
        assert np.array_equal(array, stored), f"{self.scope}: values do not fit {np.dtype(dtype)}"
        name = self._free(f"constant.{len(self._constants)}")
        self._constants.append(self._counted(numpy_helper.from_array(stored, name)))
        return Value(self, self._constants[-1].name, stored.dtype)

    def nibbles(self, codes: Tensor) -> Value:
        """Numbers 0..15 stored two to a byte, where the opset can; uint8 when they are read."""
        if self.opset < UINT4_OPSET:
            return self.constant(codes, np.uint8)
        raw, name = pack(codes, 4).numpy().tobytes(), self._free(f"constant.{len(self._constants)}")
        self._constants.append(self._counted(helper.make_tensor(name, TensorProto.UINT4, codes.shape, raw, raw=True)))
        return Value(self, name, np.dtype(np.void)).cast(np.uint8)

    def scalar(self, number: Number, dtype: np.dtype[Any]) -> Value:
        """One number, stored once however often it is asked for."""
        key = (int(number), dtype)
        if key not in self._scalars:
            self._scalars[key] = self.constant(np.array(int(number)), dtype)
        return self._scalars[key]

    def shape(self, sizes: Sequence[int]) -> Value:
        """Sizes, axes or positions, as operators take them: int64."""
        return self.constant(sizes, np.int64)

    def input(self, name: str, dtype: Any) -> Value:
        """What the graph is given."""
        return Value(self, name, np.dtype(dtype))

    def model(
        self,
        given: tuple[Value, Sequence[int | str]],
        results: Sequence[tuple[Value, Sequence[int | str]]],
        metadata: Mapping[str, str],
        version: str,
    ) -> ModelProto:
        """The graph as a model.

        Arguments:
            given, results: its input and its outputs, each with its shape.
            metadata: strings that are kept with it.
            version: of the producer.
        """
        ends = [_info(*given)], [_info(*result) for result in results]
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(
            helper.make_graph(self._nodes, "vitquant", *ends, self._constants, value_info=self._shapes),
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),
            producer_name="vitquant",
            producer_version=version,
        )
        helper.set_model_props(model, dict(metadata))
        return model

    def _free(self, name: str) -> str:
        """A name that no value has yet: this one, or this one with strokes behind it."""
        while name in self._taken:
            name += "'"
        self._taken.add(name)
        return name

    def _counted(self, constant: TensorProto) -> TensorProto:
        self._bytes += len(constant.raw_data)
        if self._bytes > LARGEST_MODEL - _ROOM:
            reason = "the model has more than 2 GB, which one .onnx file cannot hold"
            raise ExportError(f"{self.scope}: {reason}; use fewer bits or a smaller model")
        return constant


def _info(value: Value, shape: Sequence[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(value.name, helper.np_dtype_to_tensor_dtype(value.dtype), shape)

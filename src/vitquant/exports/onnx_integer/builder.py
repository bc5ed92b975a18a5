"""A small builder of ONNX graphs, whose values have Python operators, so that integer formulas look as elsewhere."""

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

UINT4_OPSET = 21  # the first opset with UINT4; in earlier ones 4-bit codes take a byte
LARGEST_MODEL = 2**31 - 1  # bytes, the limit of a protobuf message
_ROOM = 2**20  # bytes left for everything except constants, whose size is counted when they are added

Number = int | np.integer[Any]


@dataclass(frozen=True)
class Value:
    """A tensor of a graph; numbers in an expression with it become constants of its dtype.

    Arguments:
        graph: the graph of the tensor.
        name: its name in the graph.
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
        """The floor of the quotient, for non-negative values only, since ONNX rounds towards zero."""
        return self._with("Div", other)

    def __rshift__(self, digits: Value | Number) -> Value:
        """The value shifted right by some bits, for unsigned values only, as in ONNX."""
        return self._with("BitShift", digits, direction="RIGHT")

    def at_least(self, other: Value | Number) -> Value:
        """Whether each element is >= the other: bool."""
        return self._with("GreaterOrEqual", other, dtype=bool)

    def where(self, then: Value | Number, otherwise: Value | Number) -> Value:
        """`then` where this bool value is true, else `otherwise`; at least one of them is a `Value`."""
        dtype = next(each.dtype for each in (then, otherwise) if isinstance(each, Value))
        chosen = (each if isinstance(each, Value) else self.graph.scalar(each, dtype) for each in (then, otherwise))
        return self.graph.node("Where", self, *chosen, dtype=dtype)

    def minimum(self, other: Value | Number) -> Value:
        """The elementwise minimum; not for int64."""
        return self._orderly()._with("Min", other)

    def maximum(self, other: Value | Number) -> Value:
        """The elementwise maximum; not for int64."""
        return self._orderly()._with("Max", other)

    def clip(self, low: int, high: int) -> Value:
        """The value clamped to low..high; not for int64."""
        bounds = (self.graph.scalar(bound, self.dtype) for bound in (low, high))
        return self.graph.node("Clip", self._orderly(), *bounds)

    def cast(self, dtype: Any) -> Value:
        """The same numbers in another dtype; of integers that do not fit, the lowest bits."""
        dtype = np.dtype(dtype)
        if dtype == self.dtype:
            return self
        return self.graph.node("Cast", self, dtype=dtype, to=helper.np_dtype_to_tensor_dtype(dtype))

    def sum(self, axes: Sequence[int] = (-1,), keep: bool = True) -> Value:
        """The sum over some axes, for 32- or 64-bit integers."""
        return self.graph.node("ReduceSum", self, self.graph.shape(axes), keepdims=int(keep))

    def largest(self) -> Value:
        """The maximum over the last axis, which is kept with size one; not for int64."""
        return self.graph.node("ReduceMax", self._orderly(), self.graph.shape((-1,)), keepdims=1)

    def entries(self, index: Value) -> Value:
        """The elements of this vector at the positions `index`."""
        return self.graph.node("Gather", self, index, axis=0)

    def _orderly(self) -> Value:
        # ONNX Runtime 1.31 picks the wrong one of two int64 whose upper 32 bits are equal (its pull request 32475).
        assert self.dtype != np.int64, f"{self.graph.scope}: no minimum or maximum of int64; compare and choose"
        return self

    def _with(self, operator: str, other: Value | Number, **attributes: Any) -> Value:
        if not isinstance(other, Value):
            other = self.graph.scalar(other, self.dtype)
        return self.graph.node(operator, self, other, **attributes)


class Graph:
    """Collects the nodes and constants of an ONNX graph.

    Arguments:
        opset: the version of ONNX's operators.
        ends: the names of inputs and outputs, which no other value gets.

    Attributes:
        scope: the prefix of the names of nodes, set by the caller.
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
        """Add a node and return its result, of the dtype of its first input unless one is given."""
        name = self._free(f"{self.scope}/{operator}.{len(self._nodes)}")
        self._nodes.append(helper.make_node(operator, [each.name for each in inputs], [name], name, **attributes))
        return Value(self, name, inputs[0].dtype if dtype is None else np.dtype(dtype))

    def named(self, value: Value, name: str) -> Value:
        """Rename a value if it is the result of the last node, and return it; other values keep their name."""
        if not self._nodes or self._nodes[-1].output[0] != value.name:
            return value
        self._nodes[-1].output[0] = self._free(name)
        return replace(value, name=self._nodes[-1].output[0])

    def output(self, value: Value, name: str) -> Value:
        """A value under the name of an output."""
        self._nodes.append(helper.make_node("Identity", [value.name], [name], self._free(f"{self.scope}/{name}")))
        return replace(value, name=name)

    def describe(self, value: Value, shape: Sequence[int | str]) -> None:
        """Declare the shape of a value that ONNX cannot infer; sizes that depend on the batch are strings."""
        self._shapes.append(_info(value, shape))

    def constant(self, values: Tensor | np.ndarray[Any, Any] | Sequence[int], dtype: Any) -> Value:
        """Add a constant tensor."""
        array = np.asarray(values)
        stored = array.astype(dtype)
        assert np.array_equal(array, stored), f"{self.scope}: values do not fit {np.dtype(dtype)}"
        name = self._free(f"constant.{len(self._constants)}")
        self._constants.append(self._counted(numpy_helper.from_array(stored, name)))
        return Value(self, self._constants[-1].name, stored.dtype)

    def nibbles(self, codes: Tensor) -> Value:
        """Add a constant of numbers 0..15, stored two to a byte if the opset has UINT4, and read as uint8."""
        if self.opset < UINT4_OPSET:
            return self.constant(codes, np.uint8)
        raw, name = pack(codes, 4).numpy().tobytes(), self._free(f"constant.{len(self._constants)}")
        self._constants.append(self._counted(helper.make_tensor(name, TensorProto.UINT4, codes.shape, raw, raw=True)))
        return Value(self, name, np.dtype(np.void)).cast(np.uint8)

    def scalar(self, number: Number, dtype: np.dtype[Any]) -> Value:
        """A constant of one number, which is stored only once."""
        key = (int(number), dtype)
        if key not in self._scalars:
            self._scalars[key] = self.constant(np.array(int(number)), dtype)
        return self._scalars[key]

    def shape(self, sizes: Sequence[int]) -> Value:
        """A constant of sizes, axes or positions, in the int64 that operators take."""
        return self.constant(sizes, np.int64)

    def input(self, name: str, dtype: Any) -> Value:
        """The value of a graph input."""
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
            metadata: strings by name that are stored in the model.
            version: of the producer, vitquant.
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

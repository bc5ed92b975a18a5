"""An integer program as an ONNX model of standard integer operators, bit for bit what the interpreter computes.

The format serves to check other runtimes and is not fast: it has no floating point between the codes of the images
and those of the outputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, assert_never

import numpy as np

from vitquant.errors import ExportError
from vitquant.exports.onnx_integer.arithmetic import shift_clamped
from vitquant.exports.onnx_integer.builder import UINT4_OPSET, Graph, ModelProto, Value
from vitquant.exports.onnx_integer.moves import concatenate, move
from vitquant.exports.onnx_integer.operations import (
    distances,
    normalize,
    normalize_by_squares,
    published_softmax_to_powers,
    softmax_to_levels,
    softmax_to_powers,
)
from vitquant.exports.onnx_integer.products import Bytes, bytes_of, convolution, matmul
from vitquant.exports.sizes import check_batch_and_opset
from vitquant.program import instructions as p
from vitquant.program.shapes import all_shapes
from vitquant.runtime.metadata import to_metadata
from vitquant.runtime.onnx_files import seal
from vitquant.version import __version__

FORMAT = "onnx-integer/2"
INPUT = "images"
_BYTES = ("u8", "s8")
DTYPES: dict[str, Any] = {
    "u4": np.uint8, "s4": np.int8, "u8": np.uint8, "s8": np.int8, "u16": np.int32, "s16": np.int32,
    "s32": np.int32, "s64": np.int64,
}  # fmt: skip


def onnx_integer_model(
    program: p.IntegerProgram, float_io: bool = False, batch: int | None = None, opset: int | None = None
) -> ModelProto:
    """An integer program as an ONNX model.

    Its input `images` and its outputs, which have the program's names, are codes, in the smallest type for which ONNX
    Runtime has the operators. `metadata_props` hold the program's facts: scales and zero points as JSON, recipe and
    bits (docs/integers.md).

    Arguments:
        program: from `lower`, so that its ranges are proved.
        float_io: whether the graph takes float32 images and quantizes them, and dequantizes its outputs to float32.
        batch: a fixed batch size, with which every size in the graph is a number; any when None.
        opset: one of `OPSETS`; 21 when None. Before 21, 4-bit weights take a byte each.

    Raises:
        ExportError: onnx is missing, batch or opset is not supported, a sum or an operand has more bits than ONNX's
            integer operators take, or the model has more than 2 GB.
    """
    check_batch_and_opset("onnx-integer", batch, opset)
    return _Export(program, batch, opset or UINT4_OPSET).model(float_io)


class _Export:
    """Translates a program in one pass; `values` maps each register to its value in the ONNX graph."""

    def __init__(self, program: p.IntegerProgram, batch: int | None, opset: int) -> None:
        self.program, self.batch, self.graph = program, batch, Graph(opset, (INPUT, *program.outputs))
        self.values: dict[str, Value] = {}
        self.shapes = all_shapes(program)

    def model(self, float_io: bool) -> ModelProto:
        """Export every instruction."""
        graph, program = self.graph, self.program
        graph.scope = "input"
        images = graph.input(INPUT, np.float32 if float_io else self._dtype(program.input))
        self.values[program.input] = self._quantized(images) if float_io else images
        for instruction in program.instructions:
            graph.scope = instruction.site
            result = graph.named(self._exported(instruction).cast(self._dtype(instruction.output)), instruction.output)
            self.values[instruction.output] = result
            if isinstance(instruction, p.Reshape) or self.batch is not None:
                # Without a common name for equal sizes ONNX Runtime loads DeiT-Tiny in ten seconds instead of one.
                graph.describe(result, self._sizes(instruction.output))
        graph.scope = "output"
        results = []
        for name, register in program.outputs.items():
            codes = self.values[register]
            result = graph.output(self._dequantized(codes, name) if float_io else codes, name)
            results.append((result, self._sizes(register)))
        return seal(graph.model((images, self._sizes(program.input)), results, self._metadata(), __version__))

    def _sizes(self, name: str) -> list[int | str]:
        """A register's shape, with a string for the size that grows with the batch unless the batch is fixed."""
        return [size if size >= 0 else self._grown(-size) for size in self.shapes[name]]

    def _fixed(self, i: p.Reshape) -> tuple[int, ...]:
        """The shape of a reshape's result, without -1 if the batch is fixed."""
        return i.shape if self.batch is None else tuple(int(size) for size in self._sizes(i.output))

    def _grown(self, images: int) -> int | str:
        """A size of that many for each image of the batch: a number if the batch is fixed, else a string."""
        if self.batch is not None:
            return images * self.batch
        return "batch" if images == 1 else f"{images}*batch"

    def _exported(self, instruction: p.Instruction) -> Value:
        match instruction:
            case p.Linear() | p.Convolution() | p.Product() as i if self.program.registers[i.output].type == "s64":
                raise ExportError(f"{i.site}: its sums have 64 bits, ONNX's have 32; use fewer bits for its operands")
            case p.Linear() as i:
                product = matmul(self._bytes(i.input, i.input_zero), self._weight(i))
                return product if i.bias is None else product + self._read(i.bias, np.int32)
            case p.Convolution() as i:
                images, kernel = self._bytes(i.input, i.input_zero), self._kernel(i)
                result = convolution(images, kernel, i.stride, i.padding, i.dilation, i.groups)
                if i.bias is None:
                    return result
                return result + self.graph.constant(self.program.constants[i.bias].view(-1, 1, 1), np.int32)
            case p.Product() as i:
                return matmul(self._bytes(i.left, i.left_zero), self._bytes(i.right, i.right_zero))
            case p.Multiply() as i:
                return (self._read(i.left) - i.left_zero) * (self._read(i.right) - i.right_zero)
            case p.Requantize() as i:
                total = self._read(i.addend)
                for name, multiplier in zip(i.inputs, i.multipliers, strict=True):
                    total = self._read(name) * self._read(multiplier) + total
                return shift_clamped(total, i.shift, i.low, i.high)
            case p.SoftmaxToPowers() as i:
                distance = self._distances(i)
                values, octaves = self._read(i.values, np.int32), self._read(i.octaves, np.int32)
                if i.published:
                    return published_softmax_to_powers(distance, values, i.zero)
                return softmax_to_powers(distance, values, octaves, i.zero, i.steps, i.offset)
            case p.SoftmaxToLevels() as i:
                distance = self._distances(i)
                steps = softmax_to_levels(distance, self._read(i.values, np.int32), i.multiplier, i.shift)
                return (steps + i.result_zero).clip(i.low, i.high)
            case p.LayerNorm() | p.RmsNorm() as i:
                x = self._read(i.input) - i.input_zero
                if i.factors is not None:
                    x = x * self.graph.constant(1 << self.program.constants[i.factors], np.int64)
                written = normalize if isinstance(i, p.LayerNorm) else normalize_by_squares
                normalized = written(x, self._shape(i.input)[-1], i.epsilon, i.largest)
                total = normalized * self._read(i.multiplier) + self._read(i.addend)
                return shift_clamped(total, i.shift, i.low, i.high)
            case p.Lookup() as i:
                index = self._read(i.input, np.int32)
                return self._read(i.table, self._dtype(i.output)).entries(index - i.lowest if i.lowest else index)
            case p.Sum() as i:
                return (self._read(i.input) - i.input_zero).sum(i.axes, i.keep)
            case p.Concat() as i:
                shapes = [self._sizes(name) for name in i.inputs]
                return concatenate([self._read(name, self._dtype(i.output)) for name in i.inputs], shapes, i.axis)
            case p.Reshape() | p.Permute() | p.Slice() | p.Roll() | p.Pad() as i:
                moved = replace(i, shape=self._fixed(i)) if isinstance(i, p.Reshape) else i
                return move(moved, self._read(i.input, self._dtype(i.output)), self._shape(i.input))
            case _:
                assert_never(instruction)

    # Registers and constants.

    def _read(self, name: str, dtype: Any = np.int64) -> Value:
        """The value of a register or a constant, cast to a dtype."""
        if name in self.values:
            return self.values[name].cast(dtype)
        return self.graph.constant(self.program.constants[name], dtype)

    def _dtype(self, name: str) -> Any:
        return DTYPES[self.program.registers[name].type]

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.program.registers[name].shape

    def _bytes(self, name: str, zero: int) -> list[Bytes]:
        type = self.program.registers[name].type
        if name in self.values:
            return bytes_of(self.graph, self.values[name], type, zero)
        return bytes_of(self.graph, self.program.constants[name], type, zero)

    def _weight(self, i: p.Linear) -> list[Bytes]:
        """The transposed weight as bytes, with one zero point for all columns or one for each."""
        zero = 0 if i.weight_zero is None else self.program.constants[i.weight_zero].flatten()
        return bytes_of(self.graph, self.program.constants[i.weight].T, self.program.registers[i.weight].type, zero)

    def _kernel(self, i: p.Convolution) -> list[Bytes]:
        """The kernel as bytes; zero points are subtracted, because ConvInteger takes only a single one."""
        kernel = self.program.constants[i.weight]
        if i.weight_zero is None:
            return bytes_of(self.graph, kernel, self.program.registers[i.weight].type, 0)
        kernel = kernel - self.program.constants[i.weight_zero]
        type = p.smallest_type(int(kernel.min()), int(kernel.max()), among=("s16", "s32"))
        return bytes_of(self.graph, kernel, type, 0)

    def _distances(self, i: p.Softmax) -> Value:
        if self.program.registers[i.input].type == "s64":
            raise ExportError(f"{i.site}: its scores have 64 bits, ONNX's maximum has 32; quantize them")
        mask = None if i.mask is None else self.graph.constant(self.program.constants[i.mask] > 0, bool)
        return distances(self._read(i.input, np.int32), mask, len(self.program.constants[i.values]) - 1)

    # Float input and outputs.

    def _quantized(self, images: Value) -> Value:
        """The codes of float images."""
        dtype, facts = self._byte(self.program.input), self.program.facts["input"]
        scale = self.graph.constant(np.array(facts["scale"], np.float32), np.float32)
        zero = self.graph.scalar(facts["zero_point"], dtype)
        codes = self.graph.node("QuantizeLinear", images, scale, zero, dtype=dtype)
        limits = self.program.registers[self.program.input].limits
        return codes if (facts["low"], facts["high"]) == limits else codes.clip(facts["low"], facts["high"])

    def _dequantized(self, codes: Value, name: str) -> Value:
        """The real values of an output's codes, float32."""
        register, facts = self.program.outputs[name], self.program.facts["outputs"][name]
        scale = np.array(facts["scale"], np.float32)
        if self.program.registers[register].type not in _BYTES:
            steps = codes.cast(np.int64) - facts["zero_point"]
            return steps.cast(np.float32) * self.graph.constant(scale, np.float32)
        zero = np.full(scale.shape, facts["zero_point"])
        dtype = np.dtype(self._dtype(register))
        operands = self.graph.constant(scale, np.float32), self.graph.constant(zero, dtype)
        return self.graph.node("DequantizeLinear", codes, *operands, dtype=np.float32, axis=-1)

    def _byte(self, name: str) -> np.dtype[Any]:
        type = self.program.registers[name].type
        if type not in _BYTES:
            raise ExportError(f"{name} is {type}, and ONNX quantizes float to bytes; export it without --float-io")
        return np.dtype(self._dtype(name))

    def _metadata(self) -> dict[str, str]:
        fixed = {} if self.batch is None else {"batch": self.batch}
        return to_metadata({"format": FORMAT, "version": __version__, **self.program.facts, **fixed})

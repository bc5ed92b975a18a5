"""Rewrites of the exported graph after torch has written it: barriers against wrong fusions, types, names.

This module needs the extra `onnx`. Every rewrite is in place.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vitquant.exports.qdq.operators import OPERAND, STORED_AS

# Runtimes move quantizers across these operators, and so see the quantizer of an operator behind them.
_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Concat", "Mul", "Clip"}


def rewrite(graph: ir.Graph) -> None:
    """Rewrite a graph that was exported from the modules of `operators` to the form that is written to files."""
    keep_softmax_apart(graph)
    keep_convolutions_apart(graph)
    give_parameters(graph)
    give_names(graph)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def keep_softmax_apart(graph: ir.Graph) -> None:
    """Insert an Abs, which changes no probability, between every softmax and a QuantizeLinear.

    ONNX Runtime fuses DequantizeLinear, Softmax, QuantizeLinear to QLinearSoftmax, for any scale, and also if
    rearrangements lie between them. That operator rounds 1 / scale down, and returns zeros for scales below
    exp(-5) / row length, where its table of exponentials overflows (onnxruntime 1.31.1). The optimizer removes Clip,
    Identity, Cast, Relu and additions of zero before the fusion, but not Abs.
    """
    for node in list(graph):
        if node.op_type == "Softmax" and _feeds_quantizer(node.outputs[0]):
            _insert_after(graph, node, "Abs")


def keep_convolutions_apart(graph: ir.Graph) -> None:
    """Insert a Max with the lowest float, which changes nothing, between every convolution and a QuantizeLinear.

    OpenVINO moves the quantization of a concatenation or transposition up to the convolution before it, and thereby
    loses the bias or, if there is none, rounds at another place (openvino 2026.4.1).
    """
    for node in list(graph):
        if node.op_type == "Conv" and _feeds_quantizer(node.outputs[0]):
            lowest = _stored(graph, "lowest", ir.tensor(np.array(np.finfo(np.float32).min)))
            _insert_after(graph, node, "Max", lowest)


def _feeds_quantizer(value: ir.Value) -> bool:
    readers = [reader for reader, _ in value.uses()]
    return any(
        reader.op_type == "QuantizeLinear" or (reader.op_type in _MOVES and _feeds_quantizer(reader.outputs[0]))
        for reader in readers
    )


def _insert_after(graph: ir.Graph, node: ir.Node, operator: str, *operands: ir.Value) -> None:
    """Insert `operator(result, *operands)`, of the same shape, between a node's result and its readers."""
    result, readers = node.outputs[0], list(node.outputs[0].uses())
    same = ir.node(operator, [result, *operands])
    same.outputs[0].shape, same.outputs[0].type = result.shape, result.type
    graph.insert_after(node, same)
    for reader, index in readers:
        reader.replace_input_with(index, same.outputs[0])


def give_parameters(graph: ir.Graph) -> None:
    """Give every quantized value its own initializers, `NAME.scale`, `NAME.zero` and codes, 4-bit ones in 4 bits.

    torch writes 4-bit integers as bytes, and shares equal tensors. The optimizer of ONNX Runtime that rewrites weights
    as u8 fails for a zero point that several weights share (onnxruntime 1.31.1: "Attempt to replace the existing
    tensor").
    """
    for node in graph:
        operand = node.metadata_props.get(OPERAND)
        if operand is None:
            continue
        dtype = ir.DataType[node.metadata_props[STORED_AS]]
        for index, part in enumerate(("stored", "scale", "zero")):
            tensor = node.inputs[index].const_value  # type: ignore[union-attr]
            if tensor is None:
                continue  # not a constant
            if part != "scale" and dtype.bitwidth == 4:
                tensor = ir.tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype)
            node.replace_input_with(index, _stored(graph, f"{operand}.{part}", tensor))
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = dtype


def _stored(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """The initializer of that name, which is made from `tensor` if there is none yet."""
    if name not in graph.initializers:
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def give_names(graph: ir.Graph) -> None:
    """Name tensors after the model's parameters and quantized values, and remove torch's metadata.

    Codes are named `blocks.0.attn.scores:query.codes`, and their dequantized values `blocks.0.attn.scores:query`.
    """
    for value in list(graph.initializers.values()):
        value.name = str(value.name).removeprefix("graph_module.")
    for node in graph:
        operand = node.metadata_props.get(OPERAND)
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
        if operand is None:
            continue
        node.metadata_props[OPERAND] = operand
        quantizes = node.op_type == "QuantizeLinear"
        node.name = f"{operand}.{'quantize' if quantizes else 'dequantize'}"
        if not node.outputs[0].is_graph_output():
            node.outputs[0].name = f"{operand}.codes" if quantizes else operand

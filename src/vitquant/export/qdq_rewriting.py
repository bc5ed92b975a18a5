"""What the exported graph needs after torch has written it: barriers against wrong fusions, 4-bit types, names.

Needs the extra `onnx`. Every rewrite is in place.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from vitquant.export.qdq_operators import OPERAND, STORED_AS

# Between an operator and its quantizer these hide neither from a runtime: it moves quantizers over them.
_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Concat", "Mul", "Clip"}


def rewrite(graph: ir.Graph) -> None:
    """Bring a graph of `qdq_operators` to the form that is written to files."""
    keep_softmax_apart(graph)
    keep_convolutions_apart(graph)
    give_types(graph)
    give_names(graph)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def keep_softmax_apart(graph: ir.Graph) -> None:
    """Put an Abs, which changes no probability, between every softmax and a QuantizeLinear.

    ONNX Runtime fuses DequantizeLinear, Softmax, QuantizeLinear to QLinearSoftmax, whatever scale and whatever moves
    elements stand between. It rounds 1 / scale down, and it returns zeros for scales below exp(-5) / row length, where
    its table of exponentials overflows (onnxruntime 1.31.1). Clip, Identity, Cast, Relu and additions of zero are
    removed before; Abs is not.
    """
    for node in list(graph):
        if node.op_type == "Softmax" and _feeds_quantizer(node.outputs[0]):
            _insert_after(graph, node, "Abs")


def keep_convolutions_apart(graph: ir.Graph) -> None:
    """Put a Max with the smallest float, which changes nothing, between every convolution and a QuantizeLinear.

    OpenVINO moves the quantization of a concatenation or transposition up to the convolution before it, and loses the
    bias on the way, or without one rounds elsewhere (openvino 2026.4.1).
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
    """Let everything that reads a node's result read `operator(result, *operands)`, of the same shape, instead."""
    result, readers = node.outputs[0], list(node.outputs[0].uses())
    same = ir.node(operator, [result, *operands])
    same.outputs[0].shape, same.outputs[0].type = result.shape, result.type
    graph.insert_after(node, same)
    for reader, index in readers:
        reader.replace_input_with(index, same.outputs[0])


def give_types(graph: ir.Graph) -> None:
    """Give codes and zero points of 4 bits, which torch wrote as bytes, their type.

    The exporter stores equal tensors once, so other nodes may still read the bytes.
    """
    for node in graph:
        dtype = ir.DataType[node.metadata_props.get(STORED_AS, "FLOAT")]
        if dtype not in (ir.DataType.INT4, ir.DataType.UINT4):
            continue
        for index, value in enumerate(node.inputs):
            stored = None if value is None else value.const_value
            if stored is not None and stored.dtype in (ir.DataType.INT8, ir.DataType.UINT8):
                codes = ir.tensor(stored.numpy().astype(dtype.numpy()), dtype=dtype)
                node.replace_input_with(index, _stored(graph, f"{stored.name}.{dtype.name.lower()}", codes))
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = dtype


def _stored(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """The stored tensor of that name; `tensor` when there is none."""
    if name not in graph.initializers:
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def give_names(graph: ir.Graph) -> None:
    """Name tensors after the model's parameters and quantized values, and drop what torch says of its own graph.

    Codes are `blocks.0.attn.scores:query.codes`, what they stand for `blocks.0.attn.scores:query`.
    """
    for value in list(graph.initializers.values()):
        value.name = str(value.name).removeprefix("graph_module.").removeprefix("quantizers.")
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

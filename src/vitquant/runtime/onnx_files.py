"""Reading ONNX files safely: their content must be as exported, and refer to no other files and no code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vitquant.errors import ExportError
from vitquant.parsing import read_file
from vitquant.runtime.metadata import name_of

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto

LARGEST = 2**31  # bytes, the limit of a protocol buffer
DIGEST = name_of("digest")


def seal(model: ModelProto) -> ModelProto:
    """Add the digest of everything in a model, its graph and tensors included, to its metadata."""
    entry = model.metadata_props.add()
    entry.key, entry.value = DIGEST, ""
    entry.value = _digest(model)
    return model


def read_onnx(source: bytes | Path) -> tuple[ModelProto, bytes]:
    """A model and its bytes, from a file or from the content of one.

    Raises:
        ExportError: the file cannot be read, was altered since it was exported, or has what no export of vitquant has:
            tensors in other files, non-standard operators, functions, subgraphs, or omitted optional inputs.
    """
    import onnx
    from google.protobuf.message import DecodeError

    content = source if isinstance(source, bytes) else read_file(source, LARGEST, ExportError)
    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise ExportError("it is no ONNX model, or was truncated; export it again") from error
    for tensor in _tensors(model.graph):
        if tensor.external_data or tensor.data_location != onnx.TensorProto.DEFAULT:
            raise ExportError("it keeps tensors in other files; give one that holds all of them")
    foreign = {node.domain for node in model.graph.node} | {entry.domain for entry in model.opset_import}
    if model.functions or foreign - {"", "ai.onnx"}:
        raise ExportError("it has functions or operators that are not ONNX's own; export it again")
    if any(attribute.HasField("g") or attribute.graphs for node in model.graph.node for attribute in node.attribute):
        raise ExportError("it has graphs within its graph, which may run without end; export it again")
    if any(not name for node in model.graph.node for name in node.input):  # fusions would then read out of bounds
        raise ExportError("it leaves out inputs of operators, which can crash ONNX Runtime; export it again")
    said = [entry.value for entry in model.metadata_props if entry.key == DIGEST]
    if said and said != [_digest(model)]:
        raise ExportError("it was altered since it was exported: its digest differs; export it again")
    return model, content


def _digest(model: ModelProto) -> str:
    """The sha256 of everything but the digest itself."""
    entries = [(entry.key, entry.value) for entry in model.metadata_props]
    bare = type(model)()
    bare.CopyFrom(model)
    del bare.metadata_props[:]
    found = hashlib.sha256(bare.SerializeToString(deterministic=True))
    found.update(repr(sorted(entry for entry in entries if entry[0] != DIGEST)).encode())
    return found.hexdigest()


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every tensor of a graph, of its nodes' attributes and of its subgraphs."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.initializer or inner.sparse_initializer:
                    yield from _tensors(inner)

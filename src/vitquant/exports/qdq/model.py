"""A quantized model as ONNX with QuantizeLinear and DequantizeLinear, the form that runtimes fuse.

docs/onnx-qdq.md describes the file, and how each runtime executes it.
"""

from __future__ import annotations

import copy
import importlib
import io
import logging
import operator
import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from vitquant.errors import ExportError
from vitquant.exports.qdq.operators import (
    FloatOperation,
    LinearOperators,
    QuantizeDequantize,
    StoredCodes,
    quantizer_operator,
)
from vitquant.exports.sizes import OPSETS, check_batch_and_opset
from vitquant.graph.operators import LINEAR, arguments, aten, calls
from vitquant.graph.outputs import named_tensors
from vitquant.integer_modules import IntegerOperation
from vitquant.model import QuantizedModel
from vitquant.model.saved import facts
from vitquant.quantizers import Quantizer
from vitquant.quantizers.uniform import UniformQuantizer
from vitquant.runtime.fixed_batch import held_at_once
from vitquant.runtime.metadata import to_metadata
from vitquant.runtime.onnx_files import seal
from vitquant.version import __version__

if TYPE_CHECKING:
    import onnx

FORMAT = "onnx-qdq/2"
_RESULT = "vitquant.output."  # what outputs are called until all other names are known

# Without VNNI, x86 processors add two products of u8 and s8 in 16 bits, which saturates. With this option ONNX Runtime
# stores weights as u8, whose products it adds in 32 bits; on processors with VNNI this only takes twice the time.
WITHOUT_VNNI = {"session.x64quantprecision": "1"}
# From opset 21 on, ONNX Runtime fails when it rewrites s8 activations as u8; this option prevents the rewrite.
SIGNED = {"session.qdqisint8allowed": "1"}


def onnx_qdq_model(model: QuantizedModel, batch: int | None = None, opset: int | None = None) -> onnx.ModelProto:
    """The simulation as one ONNX graph of standard operators; the model is not changed.

    The graph maps `images`, float32 (batch, channels, height, width), to the model's outputs by name, float32. Every
    quantizer on equally spaced levels becomes a QuantizeLinear and a DequantizeLinear, and one on powers of two a few
    exact comparisons; weights are integers (int4 up to 4 bits, int8, int16) with a DequantizeLinear. An operation that
    the simulation computes on codes (softmax, LayerNorm, activation) becomes the float operator between its quantizers.

    Arguments:
        model: calibrated, with float32 tensors.
        batch: a fixed batch size, with which every size in the graph is a number; any when None.
        opset: one of `OPSETS`, at least 21 if the model has integers of 4 or 16 bits; when None, 20, or 21 if needed.

    Returns:
        A checked model. Its `metadata_props` have recipe, bits, version, format, and the options that an ONNX Runtime
        session needs, as JSON: `vitquant.session_options` on every processor, and on x86 without VNNI
        `vitquant.session_options.without_vnni` too.

    Raises:
        CalibrationError: a quantizer is missing.
        ExportError: the extra `onnx` is not installed, the model is not in float32, batch or opset is not supported, or
            ONNX cannot represent an operation.

    Pitfall: runtimes round sums differently from the simulation, so that codes near the middle between two levels flip.
    """
    check_batch_and_opset("onnx-qdq", batch, opset)
    model.require_calibrated()
    foreign = sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32})
    if foreign:
        raise ExportError(f"the model holds {foreign[0]}; quantize the model in float32: model.float()")
    _require_extra()
    from vitquant.exports.qdq.rewriting import rewrite

    with torch.no_grad():
        module = _with_operators(model)
        linear = [each for each in module.modules() if isinstance(each, LinearOperators)]
        opset = _opset(linear, opset)
        program = _export(_Outputs(module).eval(), len(model.outputs), model.input_shape, batch, opset)
    rewrite(program.model.graph)
    proto = program.model_proto
    _name_outputs(proto, list(model.outputs))
    signed = any(isinstance(each, QuantizeDequantize) and each.signed and each.width == 8 for each in linear)
    _describe(proto, model, SIGNED if signed and opset > 20 else {}, {} if batch is None else {"batch": batch})
    _check(proto)
    return seal(proto)


class _Outputs(nn.Module):
    """The graph with a tuple of tensors in place of the library's own output type."""

    def __init__(self, graph_module: GraphModule) -> None:
        super().__init__()
        self.graph_module = graph_module

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(named_tensors(self.graph_module(images)).values())


def _with_operators(model: QuantizedModel) -> GraphModule:
    """A copy of the model's graph, on the CPU, in which modules for ONNX operators replace the quantizers."""
    module = copy.deepcopy(model.graph_module).cpu()
    fixed: dict[Node, Any] = {}  # values that depend neither on the images nor on the batch size
    for node in list(module.graph.nodes):
        called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if node.op == "get_attr":
            fixed[node] = operator.attrgetter(str(node.target))(module)
        elif isinstance(called, Quantizer):
            name, source = str(node.target).removeprefix("quantizers."), arguments(node)[0]
            if source in fixed and isinstance(called, UniformQuantizer):
                fixed[node] = called(fixed[source])
                _store(module, node, name, called, fixed[source])
            else:
                module.set_submodule(str(node.target), quantizer_operator(name, called, len(source.meta["shape"])))
        elif isinstance(called, IntegerOperation):
            module.set_submodule(str(node.target), FloatOperation(called))
        elif node.op == "call_function" and node.all_input_nodes and fixed.keys() >= set(node.all_input_nodes):
            given, keywords = (map_arg(found, lambda node: fixed[node]) for found in (node.args, node.kwargs))
            fixed[node] = node.target(*given, **keywords)  # type: ignore[operator]
    module.graph.eliminate_dead_code()
    return GraphModule(module, module.graph)  # only with the tensors that the graph reads


def _store(module: GraphModule, node: Node, name: str, quantizer: UniformQuantizer, value: torch.Tensor) -> None:
    """Replace a quantizer by its stored codes; a linear layer's weight is stored transposed and the layer a matmul."""
    layers = list(node.users)
    is_weight = value.ndim == 2 and all(calls(user, LINEAR) and arguments(user)[0] is not node for user in layers)
    module.set_submodule(str(node.target), StoredCodes(name, quantizer, value, transposed=is_weight))
    node.args = ()
    for layer in layers if is_weight else ():
        x, weight, *bias = arguments(layer)
        layer.target, layer.args = aten.matmul.default, (x, weight)
        if bias and bias[0] is not None:
            with module.graph.inserting_before(layer):
                product = module.graph.call_function(aten.matmul.default, (x, weight))
            layer.target, layer.args = aten.add.Tensor, (product, bias[0])


def _require_extra() -> None:
    try:
        importlib.import_module("onnxscript")  # torch's exporter imports it, and it imports onnx and onnx_ir
    except ImportError as error:
        raise ExportError("ONNX files need onnx and onnxscript: pip install 'vitquant[onnx]'") from error


def _opset(operators: Iterable[LinearOperators], asked: int | None) -> int:
    """The opset asked for, or the first one that has Gelu and all types of the model."""
    wide = [each for each in operators if each.width != 8]
    if wide and asked is not None and asked < 21:
        raise ExportError(
            f"opset {asked}: the model has integers of {wide[0].width} bits, and needs 21 to {OPSETS['onnx-qdq'][-1]}"
        )
    return asked or (21 if wide else 20)


def _export(
    module: nn.Module, outputs: int, shape: Sequence[int], batch: int | None, opset: int
) -> torch.onnx.ONNXProgram:
    with held_at_once(batch or 2):
        example = torch.zeros(batch or 2, *shape)
    sizes = ({0: torch.export.Dim("batch")},) if batch is None else None
    results = [f"{_RESULT}{number}" for number in range(outputs)]
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                module, (example,), dynamo=True, dynamic_shapes=sizes,
                opset_version=opset, input_names=["images"], output_names=results, verbose=False,
            )  # fmt: skip
        except Exception as error:
            raise ExportError(f"torch cannot write the model as ONNX: {_reason(error)}") from error
    assert program is not None
    written = program.model.opset_imports[""]
    if written != opset:
        raise ExportError(
            f"opset {opset}: torch {torch.__version__} writes {written}; ask for that, or update onnxscript"
        )
    return program


def _reason(error: BaseException) -> str:
    """The first line of the error at the bottom of torch's chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _quiet() -> Generator[None]:
    """Silence the exporter, whose logs and prints are of no use to a user."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_outputs(proto: onnx.ModelProto, names: list[str]) -> None:
    """Give outputs their names; a value inside that has one of them gets another."""
    graph = proto.graph
    values = {name for node in graph.node for name in node.output} | {each.name for each in graph.initializer}
    renamed = {f"{_RESULT}{number}": name for number, name in enumerate(names)}
    for name in values.intersection(names):
        free = f"{name}'"
        while free in values or free in names:
            free += "'"
        renamed[name] = free
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    for each in (*graph.initializer, *graph.value_info, *graph.output):
        each.name = renamed.get(each.name, each.name)


def _describe(proto: onnx.ModelProto, model: QuantizedModel, options: dict[str, str], fixed: dict[str, int]) -> None:
    from onnx.helper import find_min_ir_version_for, set_model_props

    said = {
        "format": FORMAT,
        "version": __version__,
        **facts(model),
        **fixed,
        "session_options": options,
        "session_options.without_vnni": WITHOUT_VNNI,
    }
    set_model_props(proto, to_metadata(said))
    proto.ir_version = find_min_ir_version_for(proto.opset_import)
    proto.producer_name, proto.producer_version = "vitquant", __version__


def _check(proto: onnx.ModelProto) -> None:
    import onnx

    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise ExportError(f"the ONNX graph is not valid: {_reason(error)}") from error

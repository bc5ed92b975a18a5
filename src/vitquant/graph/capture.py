"""Capture an unmodified float model as one plain graph. This is the only module that uses `torch.export`."""

from __future__ import annotations

import inspect
import io
import logging
import operator
import re
import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo  # pyright: ignore[reportPrivateUsage]
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from vitquant.errors import CaptureError, ModelError, first_line
from vitquant.graph.canonical import canonicalize
from vitquant.graph.functional import functional
from vitquant.graph.fused import blamed_operator, fused_attention, named_attention
from vitquant.graph.made_masks import fold_made_masks
from vitquant.graph.operators import FILLS, arguments, aten, calls, packet
from vitquant.plain_forward import plain_forward, takes_nested_tensors
from vitquant.unwrapping import unwrapped

_CHECKS = {
    aten._assert_tensor_metadata, aten._assert_scalar, aten._assert_async, aten.sym_constrain_range,
    aten.sym_constrain_range_for_size,
}  # fmt: skip

_NO_TENSOR = (
    "the model's forward uses an object that is no tensor, such as a torch.Generator: leave out what is random, and "
    "give the rest as buffers"
)
_CANNOT = "torch.export cannot capture the model"
_SIZE = re.compile(r"input of size .*\bs\d+\b")  # a symbolic batch size in torch's message about a reshape
_TRACED_BATCH = 31  # a prime, so that few sizes in a model are multiples of it


def capture(model: nn.Module, example: torch.Tensor) -> GraphModule:
    """Capture a model as one plain `torch.fx.GraphModule` in canonical form, in evaluation mode.

    The graph module has the model's state-dict keys and its own copies of the tensors, takes a batch of
    any size, is called like the model, and gives back the library's own output type. It is checked
    against the model before it is returned. Dropout and stochastic depth are captured as evaluation
    has them: `train()` on the result changes nothing; to train, capture the model again.

    Arguments:
        model: any module whose forward takes one tensor first and needs nothing else; wrappers (`torch.compile`,
            DataParallel, DistributedDataParallel and AveragedModel) are unwrapped.
        example: float (batch, channels, height, width), on the model's device; it fixes height and width.

    Raises:
        CaptureError: the model does not take this input, cannot be captured, holds attention in one fused operator,
            or computes something else once captured.
        ModelError: it is not a module that can be captured, a parameter holds NaN or infinity, or a buffer NaN.
    """
    model = unwrapped(model)
    _refuse_non_finite(model)
    example = example.detach()
    if example.shape[0] < 2:
        example = example.expand(2, *example.shape[1:]).clone()  # torch.export specializes a batch of 1
    with plain_forward(model):
        expected = _call(model, example)
        program = _export(model, example)
        graph, constants = _copy(program, _input_name(model))
        captured = _assemble(model, graph, constants)
        longer = torch.cat([example.flip(0), example[:1]])
        with _batches_of(len(example), len(longer)):
            fold_made_masks(captured, example, longer)
            canonicalize(captured)
            if fused := fused_attention(captured.graph):
                raise CaptureError(fused)
            _compare(captured(example), expected)
            _compare(captured(longer), model(longer))
        if takes_nested_tensors(model):
            _check_nested(model, captured, example)
    return captured


@contextmanager
def _batches_of(*sizes: int) -> Generator[None]:
    """Raise torch's error as a CaptureError where the captured graph does not run."""
    try:
        yield
    except RuntimeError as error:
        tried = " and ".join(map(str, sizes))
        raise CaptureError(f"captured, the model does not run on {tried} images: {first_line(error)}") from error


def _refuse_non_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ModelError(f"{name} holds NaN or infinity; give weights that are finite")
    for name, buffer in model.named_buffers():  # infinity is valid in a mask
        if torch.isnan(buffer).any():
            raise ModelError(f"{name} holds NaN; give weights that are finite")


def _call(model: nn.Module, example: torch.Tensor) -> object:
    try:
        return model(example)
    except Exception as error:
        shape, own = tuple(example.shape), next((each.dtype for each in model.parameters()), example.dtype)
        reason = first_line(error)
        if own != example.dtype:
            reason = f"it is of {own} and the input of {example.dtype}; give model.float(), or images of its precision"
        raise CaptureError(
            blamed_operator(error) or f"the model refuses an input of shape {shape}: {reason}"
        ) from error


def _export(model: nn.Module, example: torch.Tensor) -> ExportedProgram:
    batch = {0: Dim("batch")}
    dynamic = (batch,) if _first_parameter(model) else ((batch,),)  # a forward of *args takes them as one tuple
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        try:
            # Where the batch equals another size of the model, torch takes the two for one symbol, and a small batch
            # easily divides another size. Tracing computes no values, so that uninitialized memory is enough.
            example = example.new_empty((_TRACED_BATCH, *example.shape[1:]))
            program = torch.export.export(model, (example,), dynamic_shapes=dynamic, strict=False)
        except Exception as error:
            if "data-dependent" in str(error):
                raise CaptureError(f"the model's forward depends on the values of its input{_place(error)}") from error
            if "Constraints violated" not in str(error) and "specialized" not in str(error):
                what = "the model's forward fixes the batch size" if _SIZE.search(str(error)) else _CANNOT
                reason = f"{what}: {first_line(error)}"
                raise CaptureError(blamed_operator(error) or reason) from error
            # `len(x)` and its like fix the batch in non-strict mode only.
            try:
                program = torch.export.export(model, (example,), dynamic_shapes=dynamic, strict=True)
            except Exception as strict_error:
                reason = f"the model's forward fixes the batch size: {first_line(strict_error)}"
                no_tensor = re.search(r"opaque object|\(Generator\)", str(strict_error))
                raise CaptureError(_NO_TENSOR if no_tensor else reason) from strict_error
        return functional(program)


@contextmanager
def _quiet() -> Generator[None]:
    """Silence torch.export, which logs and prints pages about every constraint; our error says it in one line."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _place(error: Exception) -> str:
    """The line of the model's code that torch.export blames."""
    blamed = re.search(r"raised this error:\n(?:.*\n)*? *File .*\n +(.+)\n(?! *File)", str(error))
    return f": {blamed.group(1)}" if blamed else ""


def _input_name(model: nn.Module) -> str:
    return _first_parameter(model) or "x"


def _first_parameter(model: nn.Module) -> str | None:
    """The name of the first parameter of a model's forward; None where that is `*args`."""
    first = next(iter(inspect.signature(model.forward).parameters.values()), None)
    return None if first is None or first.kind is inspect.Parameter.VAR_POSITIONAL else first.name


def _copy(program: ExportedProgram, input_name: str) -> tuple[Graph, dict[str, torch.Tensor]]:
    """The nodes of the program in a fresh graph: parameters read by name, constants computed once."""
    signature = program.graph_signature
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    graph, constants = Graph(), {}
    copied: dict[Node, Node] = {}
    known: dict[Node, object] = {}  # nodes that depend on neither input nor parameters, and their values

    def argument(node: Node) -> Node:
        if node not in copied:
            value = known[node]
            name = next((name for name, other in constants.items() if _identical(other, value)), None)
            if name is None:
                name = f"constant_{len(constants)}"
                constants[name] = value
            copied[node] = graph.get_attr(name)
            copied[node].meta = _metadata(node)
        return copied[node]

    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            match spec.kind:
                case InputKind.USER_INPUT:
                    copied[node] = graph.placeholder(input_name)
                case InputKind.CONSTANT_TENSOR:
                    known[node] = program.constants[str(spec.target)]
                    continue
                case InputKind.PARAMETER | InputKind.BUFFER:
                    copied[node] = graph.get_attr(str(spec.target))
                case _:
                    raise CaptureError(_NO_TENSOR)
            copied[node].meta = _metadata(node)
        elif node.op == "output":
            outputs = node.args[0][len(program.graph_signature.output_specs) - _user_outputs(program) :]
            results = [argument(result) if isinstance(result, Node) else result for result in outputs]
            graph.output(results)
        elif node.op == "call_function":
            if node.target in _CHECKS or getattr(node.target, "overloadpacket", None) in _CHECKS:
                continue
            if _is_constant(node, known):
                known[node] = node.target(*_values(node.args, known), **_values(node.kwargs, known))
            elif calls(node, FILLS) and -1 not in _shape(node.meta["val"]):
                known[node] = _filled(node)
            else:
                copied[node] = graph.node_copy(node, argument)
                copied[node].meta = _metadata(node)
        else:
            fused = named_attention(program.graph)  # flex attention holds a subgraph of its own
            reason = f"the captured model holds a {node.op} node, {node.name}: control flow is not supported"
            raise CaptureError(fused or reason)
    graph.set_codegen(
        _PyTreeCodeGen(_PyTreeInfo([input_name], _in_spec(), program.call_spec.out_spec)),
    )
    return graph, constants


def _in_spec() -> pytree.TreeSpec:
    """One positional tensor and no keywords."""
    return pytree.tree_structure(((0,), {}))


def _user_outputs(program: ExportedProgram) -> int:
    return len(program.graph_signature.user_outputs)


def _is_constant(node: Node, known: dict[Node, object]) -> bool:
    if not all(argument in known for argument in node.all_input_nodes):
        return False
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags


def _filled(node: Node) -> torch.Tensor:
    """The value of a fill such as `new_zeros`, which takes only dtype and device of its tensor (as in torchvision)."""
    value = node.meta["val"]
    like = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    number: Any = FILLS[packet(node)]
    return torch.full_like(like, arguments(node)[2] if number is None else number)


def _values(arguments: Any, known: dict[Node, Any]) -> Any:
    return map_arg(arguments, lambda node: known[node])


def _identical(left: object, right: object) -> bool:
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return False
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def _metadata(node: Node) -> dict[str, object]:
    """Shape with -1 for what grows with the batch, dtype, and the path of the module the node came from."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    found: dict[str, object] = {"module": stack[-1] if stack and node.target is not aten.sym_size.int else ""}
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        found |= {"shape": _shape(value), "dtype": value.dtype}
    elif isinstance(value, list | tuple):
        found["shapes"] = tuple(_shape(part) for part in value if isinstance(part, torch.Tensor))
    return found


def _shape(value: torch.Tensor) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else -1 for size in value.shape)


def _assemble(model: nn.Module, graph: Graph, constants: dict[str, torch.Tensor]) -> GraphModule:
    """A graph module with copies of all the model's tensors under their own names, tied ones still tied."""
    root = nn.Module()
    copies: dict[int, torch.Tensor] = {}
    persistent = set(model.state_dict(keep_vars=True))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        fresh = copies.setdefault(id(parameter), nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
        _register(root, name, fresh, persistent=True)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        fresh = copies.setdefault(id(buffer), buffer.detach().clone())
        _register(root, name, fresh, persistent=name in persistent)
    for name, value in constants.items():
        _register(root, name, value.detach().clone(), persistent=False)
    names = [*dict(root.named_parameters(remove_duplicate=False)), *dict(root.named_buffers(remove_duplicate=False))]
    captured = GraphModule(root, graph, class_name=type(model).__name__)
    for name in names:  # GraphModule copies only what its graph reads; the state dict has more
        value = operator.attrgetter(name)(root)
        _register(captured, name, value, persistent=name in persistent)
    captured.eval()
    return captured


def _register(module: nn.Module, name: str, value: torch.Tensor, persistent: bool) -> None:
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if isinstance(value, nn.Parameter):
        module.register_parameter(last, value)
    else:
        if hasattr(module, last):
            delattr(module, last)
        module.register_buffer(last, value, persistent=persistent)


def _check_nested(model: nn.Module, captured: GraphModule, example: torch.Tensor) -> None:
    """Check that nothing reads masked tokens: PyTorch's nested-tensor fast path drops them and gives zeros instead."""
    torch.backends.mha.set_fastpath_enabled(True)  # `plain_forward` restores the setting
    try:
        _compare(captured(example), _call(model, example))
    except CaptureError as error:
        raise CaptureError(
            "the model reads masked tokens, which nn.TransformerEncoder leaves zero where it computes on nested "
            "tensors; build it with enable_nested_tensor=False, or do not read them"
        ) from error


def _compare(found: object, expected: object) -> None:
    for left, right in zip(_tensors(found), _tensors(expected), strict=True):
        if left.shape != right.shape:
            raise CaptureError(f"captured, the model gives {tuple(left.shape)} where it gave {tuple(right.shape)}")
        if not right.is_floating_point() or not torch.isfinite(right).all():
            continue  # calibration will name the operand where a model overflows
        bound = min(0.05, 1000 * torch.finfo(right.dtype).eps) * max(1.0, right.abs().max().item())
        if not torch.allclose(left, right, rtol=0, atol=bound):
            worst = (left - right).abs().max().item()
            raise CaptureError(f"captured, the model's output differs by {worst:.2g}: does its forward use randomness?")


def _tensors(output: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]

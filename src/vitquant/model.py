"""A captured model with quantizers on the operands of its sites: run, look inside, save, load."""

from __future__ import annotations

import math
import operator
import platform
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from vitquant.autocast import autocasts, own_precision
from vitquant.checkpoint import digest_of, read_checkpoint, write_checkpoint
from vitquant.config import PROVENANCE, check_config
from vitquant.errors import CalibrationError, CaptureError, CheckpointError, ModelError, RecipeError
from vitquant.graph.fingerprint import structural_fingerprint
from vitquant.graph.operators import PRODUCTS, calls, is_rearrangement, is_selection
from vitquant.graph.plain import plain, rebuilt
from vitquant.graph.stored import constants
from vitquant.operations import Arithmetic, IntegerOperation
from vitquant.operations.replacement import (
    operation_at,
    prepare_operations,
    reconnect_operations,
    replace_operations,
)
from vitquant.packing import pack
from vitquant.quantizers import Quantizer
from vitquant.recipe import Assignment, Bits, Recipe, assign
from vitquant.sites import Site, Value, find_sites, find_values
from vitquant.stored_tensors import load_tensors, stored_quantizer, unpack_weights
from vitquant.tapped import TappedInterpreter, behind
from vitquant.version import __version__

Tap = Callable[[torch.Tensor], None]
Taps = Mapping[str, Tap]

_QUANTIZERS, _GRAPH = "quantizers", "graph_module"
_NO_TORCHSCRIPT = (
    "torch.jit.trace would fix the size of the batch, and TorchScript is deprecated; "
    "use torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},))"
)


@dataclass(frozen=True)
class Record:
    """What a method did: for the report, and saved with the model.

    Arguments:
        method: its name.
        summary: facts about the whole run, plain JSON values.
        decisions: for each value's name what was decided there, plain JSON values.
    """

    method: str
    summary: Mapping[str, Any] = field(default_factory=dict)
    decisions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class QuantizedModel(nn.Module):
    """An unmodified model's graph, the sites found in it, and the quantizers that a recipe puts there.

    It is called like the model it was made from and gives the same output type. Until its methods have
    run it has no quantizers, and calling it is an error: an uncalibrated model never answers.

    Arguments:
        captured: what `capture` returned.
        recipe: which operand gets which spec.
        bits: what the recipe's symbols stand for.
        input_shape: (channels, height, width) of the images.

    Attributes:
        graph_module: the graph; its parameters have the float model's state-dict keys.
        sites, values: what can be quantized.
        assignments: for each value's name its spec, observer and rule, from the recipe.
        arithmetic: how softmax, LayerNorm and activations are computed on codes; None when all of them are float.
        float_reasons: for each of their sites that stays in float all the same, why.
        records: what each method did, in order.
        provenance: source, preprocessing and calibration data, plain JSON values, saved with the model.

    Raises:
        RecipeError: the recipe does not fit the model.
        CaptureError: the graph holds no attention.
    """

    def __init__(self, captured: GraphModule, recipe: Recipe, bits: Bits, input_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.graph_module = captured
        self.recipe, self.bits, self.input_shape = recipe, bits, input_shape
        self.sites: tuple[Site, ...] = find_sites(captured)
        if not any(calls(node, PRODUCTS) for node in captured.graph.nodes):
            raise CaptureError("the model has no attention (no matrix product of activations): is it a transformer?")
        self.values: tuple[Value, ...] = find_values(captured, self.sites)
        self.assignments: dict[str, Assignment] = assign(recipe, bits, self.values)
        self.fingerprint = structural_fingerprint(captured)
        self.arithmetic: Arithmetic | None = None
        self.float_reasons: dict[str, str] = {}
        self.records: list[Record] = []
        self.provenance: dict[str, Any] = {}
        self._calibrated = not self.quantized_names
        self.eval()
        captured.register_load_state_dict_post_hook(_prepare)

    def forward(self, images: torch.Tensor | None = None, **named: torch.Tensor) -> Any:
        """The quantized model's output: for images (batch, channels, height, width), the library's own type.

        Under autocast it is computed in the model's own precision, as it was evaluated.

        Arguments:
            images: or, as a keyword, by the name that the model gives them.

        Raises:
            CalibrationError: a quantizer is missing.
            CaptureError: images of another size; or torch.jit.trace asks, which would fix the size of the batch.

        Pitfall: integer operations check at every call that they hold the constants of their scales. What is compiled
            or exported cannot: change scales before, by `insert`, `load_state_dict`, or followed by a call.
        """
        if torch.jit.is_tracing():
            raise CaptureError(_NO_TORCHSCRIPT)
        if not self._calibrated:
            self.require_calibrated()
        first = () if images is None else (images,)
        for each in (*first, *named.values()):
            self._check_shape(each)
            if autocasts(each.device.type):
                return self._in_own_precision(*first, **named)
        return self.graph_module(*first, **named)

    def _in_own_precision(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        """The output without autocast, of images that it may have halved."""
        own = next(each.dtype for each in self.parameters() if each.is_floating_point())
        kind = (*args, *kwargs.values())[0].device.type
        with own_precision(kind):
            return self.graph_module(*(x.to(own) for x in args), **{name: x.to(own) for name, x in kwargs.items()})

    def __prepare_scriptable__(self) -> NoReturn:
        raise CaptureError(_NO_TORCHSCRIPT)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedModel:
        def kept(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and _rounds(tensor, moved):
                raise ModelError(
                    f"a quantized model computes in {_dtype(tensor)}, as it was evaluated, and {_dtype(moved)} would "
                    f"round its numbers; cast the float model before quantizing it"
                )
            return moved

        return super()._apply(kept, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and copy.deepcopy take: the graph as plain data, names, shapes and output type included."""
        state = dict(super().__getstate__())
        others = {name: module for name, module in self._modules.items() if name != _GRAPH}
        return {**state, "_modules": others, _GRAPH: plain(self.graph_module)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        described = state.pop(_GRAPH)
        super().__setstate__(state)
        self._modules = {_GRAPH: rebuilt(described), **self._modules}

    def require_calibrated(self) -> None:
        """Raise unless every quantizer is there.

        Raises:
            CalibrationError: it names the first that is missing.
        """
        present = self.quantizers
        missing = [name for name in self.quantized_names if name not in present]
        if missing:
            raise CalibrationError(
                f"{missing[0]} is not calibrated, one of {len(missing)} operands: run the recipe's methods first"
            )

    def _check_shape(self, images: torch.Tensor) -> None:
        if tuple(images.shape[1:]) != self.input_shape:
            expected, found = ("x".join(map(str, shape)) for shape in (self.input_shape, images.shape[1:]))
            raise CaptureError(f"the model was captured for images of {expected}, these are {found}; resize them")

    @property
    def quantized_names(self) -> list[str]:
        """The values that the recipe quantizes."""
        return [name for name, assignment in self.assignments.items() if assignment.spec is not None]

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """The quantizers there are, by the name of their value."""
        called = [str(node.target) for node in self.graph_module.graph.nodes if node.op == "call_module"]
        targets = [target for target in called if target.startswith(f"{_QUANTIZERS}.")]
        return {target.removeprefix(f"{_QUANTIZERS}."): self.graph_module.get_submodule(target) for target in targets}  # type: ignore[return-value]

    @property
    def image_quantizer(self) -> Quantizer | None:
        """The quantizer of the images, as they are or rearranged, if they have one."""
        for node in self.graph_module.graph.nodes:
            if node.op == "call_module" and str(node.target).startswith(f"{_QUANTIZERS}."):
                source = node.all_input_nodes[0]
                while is_rearrangement(source) or is_selection(source):
                    source = source.all_input_nodes[0]
                if source.op == "placeholder":
                    return self.graph_module.get_submodule(str(node.target))  # type: ignore[return-value]
        return None

    @property
    def integer_operations(self) -> dict[str, IntegerOperation]:
        """The operations that are computed on codes, by the name of their site."""
        nodes = {node.name: node for node in self.graph_module.graph.nodes}
        found = {site.name: operation_at(self.graph_module, nodes[site.node]) for site in self.sites}
        return {name: operation for name, operation in found.items() if operation is not None}

    @property
    def blocks(self) -> dict[int, tuple[Site, ...]]:
        """The sites of each transformer block."""
        numbers = sorted({site.block for site in self.sites if site.block is not None})
        return {number: tuple(site for site in self.sites if site.block == number) for number in numbers}

    def value(self, name: str) -> Value:
        """The value of that name (`blocks.0.attn.scores:query`); any of its readers will do."""
        for value in self.values:
            if name in map(str, value.readers):
                return value
        raise KeyError(name)

    def insert(self, quantizers: Mapping[str, Quantizer]) -> None:
        """Put quantizers on values, each for everything that reads its value; those that are there are replaced.

        Arguments:
            quantizers: by the name of the value; each takes and gives tensors of the value's shape.

        Pitfall: every call compiles the graph anew, which takes longer than a forward pass of a small model;
            insert what belongs together at once.
        """
        graph, present = self.graph_module.graph, self.quantizers
        nodes = {node.name: node for node in graph.nodes}
        for name, quantizer in quantizers.items():
            value = self.value(name)
            target, node = f"{_QUANTIZERS}.{value.name}", nodes[value.node]
            if not self.graph_module.add_submodule(target, quantizer):
                raise CaptureError(f"a quantizer cannot be named {target}: the model has an attribute of that name")
            if value.name not in present:
                _route_through(graph, node, target)
        reconnect_operations(self.graph_module)
        prepare_operations(self.graph_module)
        self.graph_module.recompile()
        self._calibrated = self.quantizers.keys() >= set(self.quantized_names)

    def compute_in_integers(self, arithmetic: Arithmetic) -> None:
        """Compute softmax, LayerNorm and activations on codes, wherever their quantizers allow it.

        The scales are those of the quantizers, whenever they change. `float_reasons` says what stayed in float.

        Arguments:
            arithmetic: how.

        Raises:
            CalibrationError: a quantizer is missing, or it was called before.
        """
        self.require_calibrated()
        if self.arithmetic is not None:
            raise CalibrationError("the model computes in integers already; quantize it again for another arithmetic")
        self.float_reasons = replace_operations(self.graph_module, self.sites, arithmetic)
        prepare_operations(self.graph_module)
        self.arithmetic = arithmetic
        self.graph_module.recompile()

    def run(
        self,
        images: torch.Tensor,
        taps: Taps,
        quantized: bool | Collection[str] = True,
        operands: Taps | None = None,
        nodes: Iterable[tuple[str, Tap]] = (),
    ) -> Any:
        """Run the graph, calling `taps[name]` with each named value before its quantizer.

        Arguments:
            images: (batch, channels, height, width).
            taps: by the names of values.
            quantized: False leaves out every quantizer and integer operation: the float model; the names of values
                leave out all but their quantizers.
            operands: by `site:operand`, called with what that site reads, which may be a rearrangement or a part of
                its value, and without its quantizer only where that stands behind.
            nodes: graph nodes, and what is called with what each gives.

        Pitfall: a tap's tensor is lent for the call. Without gradients what comes after may overwrite it; a tap
            that keeps it keeps a clone.
        """
        self._check_shape(images)
        reads = {str(site.reader(each)): node for site in self.sites for each, node in site.operands.items()}
        tapped = [(self.value(name).node, tap) for name, tap in taps.items()]
        tapped += [(reads[name], tap) for name, tap in (operands or {}).items()]
        with own_precision(images.device.type):
            return self._interpreter([*tapped, *nodes], quantized).run(images)

    def known_before(self, names: Collection[str]) -> list[str]:
        """The graph nodes whose results are read behind the quantizers of these values, and that stand before them."""
        changed = behind(self.graph_module, self._targets(names))
        return [
            node.name
            for node in self.graph_module.graph.nodes
            if node not in changed and node.op != "get_attr" and any(user in changed for user in node.users)
        ]

    def resume(self, known: Mapping[str, Any], quantized: Collection[str], nodes: Iterable[tuple[str, Tap]]) -> Any:
        """The output with the quantizers of some values only, computing nothing but what they have an effect on.

        Arguments:
            known: what the nodes of `known_before(quantized)` give in float.
            quantized: the names of values.
            nodes: graph nodes that are computed, and what is called with what each gives.
        """
        return self._interpreter(nodes, quantized).resume(known)

    def read_as(self, node: str) -> str:
        """The graph node that others read in place of a node: the call of its quantizer, where it has one."""
        for call in self.graph_module.graph.nodes:
            if (
                call.op == "call_module"
                and call.args[0].name == node
                and str(call.target).startswith(f"{_QUANTIZERS}.")
            ):
                return call.name
        return node

    def _interpreter(self, tapped: Iterable[tuple[str, Tap]], quantized: bool | Collection[str]) -> TappedInterpreter:
        by_node: dict[str, list[Tap]] = {}
        for node, tap in tapped:
            by_node.setdefault(node, []).append(tap)
        active = quantized if isinstance(quantized, bool) else self._targets(quantized)
        return TappedInterpreter(self.graph_module, by_node, active)

    def _targets(self, names: Collection[str]) -> set[str]:
        return {f"{_QUANTIZERS}.{self.value(name).name}" for name in names}

    def parameter(self, value: Value) -> torch.Tensor:
        """The stored tensor that a value is.

        Raises:
            KeyError: the value is not a stored parameter.
        """
        if value.parameter is None:
            raise KeyError(value.name)
        return operator.attrgetter(value.parameter)(self.graph_module)

    def save(self, directory: str | Path, force: bool = False) -> None:
        """Write `model.safetensors` (weights as packed integers, scales, zero points) and `config.json`.

        The directory holds all of it or, when the run is killed, nothing. Loading it gives bit-identical
        outputs.

        Raises:
            CalibrationError: a quantizer is missing.
            CheckpointError: the directory cannot be written, or is not empty and not `force`; or `provenance` holds
                what it should not.
        """
        tensors, packed = self._packed()
        config = {
            **self.provenance,
            "versions": _versions(),
            "input_shape": list(self.input_shape),
            "graph_fingerprint": self.fingerprint,
            "quantization_config": {
                "quant_method": "vitquant",
                "bits": str(self.bits),
                "arithmetic": None if self.arithmetic is None else asdict(self.arithmetic),
                "recipe": self.recipe.to_dict(),
                "operands": self._operands(),
                "packed": packed,
            },
            "records": [_finite(asdict(record)) for record in self.records],
        }
        check_config(config, directory)  # what it would refuse to load
        write_checkpoint(Path(directory), tensors, config, force)

    @property
    def stored_bytes(self) -> dict[str, int]:
        """What each tensor that `save` writes takes, by its key.

        Raises:
            CalibrationError: a quantizer is missing.
        """
        tensors, _ = self._packed()
        return {key: tensor.nbytes for key, tensor in tensors.items()}

    @property
    def digest(self) -> str:
        """Tells models apart: a sha256 over the tensors that are saved, the quantizers' specs and the graph.

        It is the same for a model and for what was loaded of it.

        Raises:
            CalibrationError: a quantizer is missing.
        """
        tensors, _ = self._packed()
        arithmetic = None if self.arithmetic is None else asdict(self.arithmetic)
        return digest_of(tensors, {"graph": self.fingerprint, "operands": self._operands(), "arithmetic": arithmetic})

    @property
    def facts(self) -> dict[str, Any]:
        """What every export says of the model that it is of, plain values."""
        preprocessing = self.provenance.get("preprocessing")
        known = {} if preprocessing is None else {"preprocessing": preprocessing}
        return {"recipe": self.recipe.name, "bits": str(self.bits), "model": self.digest, **known}

    def _packed(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors that are saved, and for each that is packed its operand and shape."""
        self.require_calibrated()
        quantizers = self.quantizers
        tensors = {name: tensor.clone() for name, tensor in self.graph_module.state_dict().items()}
        computed = constants(self.graph_module)
        tensors |= {name: tensor.clone() for name, tensor in computed.items() if _is_rounded(tensor)}
        packed = {}
        for value in self._packable():
            quantizer, weight = quantizers[value.name], self.parameter(value).detach()
            codes = quantizer.encode(weight)
            if not torch.equal(quantizer.encode(quantizer.decode(codes, weight.dtype)), codes):
                continue  # bfloat16 is too coarse for this grid: only the weight itself gives these codes again
            tensors[str(value.parameter)] = pack(codes, quantizer.spec.bits)
            packed[str(value.parameter)] = {"operand": value.name, "shape": list(value.shape)}
        return tensors, packed

    def _operands(self) -> dict[str, Any]:
        """The rule and the spec of every value, as plain values."""
        return {
            name: {"rule": assignment.rule, "spec": assignment.spec.to_dict() if assignment.spec else None}
            for name, assignment in self.assignments.items()
        }

    def _packable(self) -> list[Value]:
        """Weights that nothing but one quantized operand reads: their integers are all that need be kept."""
        uses: dict[int, int] = {}
        for node in self.graph_module.graph.nodes:
            if node.op == "get_attr":
                tensor = operator.attrgetter(str(node.target))(self.graph_module)
                uses[id(tensor)] = uses.get(id(tensor), 0) + 1
        tied, quantizers = _tied(self.graph_module), self.quantizers
        return [
            value
            for value in self.values
            if value.name in quantizers
            and value.parameter is not None
            and value.readers[0].operand == "weight"
            and uses[id(self.parameter(value))] == 1
            and id(self.parameter(value)) not in tied
        ]

    @classmethod
    def restore(cls, directory: str | Path, captured: GraphModule) -> QuantizedModel:
        """The model that `save` wrote, on a capture of the same float model.

        Arguments:
            directory: what was saved.
            captured: the float model, captured; its weights do not matter.

        Raises:
            CheckpointError: the files are damaged, or the capture is not of the model that was saved.
        """
        tensors, config = read_checkpoint(Path(directory))
        quantization = check_config(config, directory)["quantization_config"]
        try:
            recipe, bits = Recipe.from_dict(quantization["recipe"]), Bits.parse(quantization["bits"])
        except RecipeError as error:
            raise CheckpointError(f"{directory}: its recipe: {error}") from None
        found = structural_fingerprint(captured)
        if found != config["graph_fingerprint"]:
            _refuse_other_precision(captured, tensors, directory)
            saved, here = config["versions"].get("torch"), torch.__version__
            hint = f"it was saved with torch {saved}, this is {here}" if saved != here else "give that model"
            raise CheckpointError(f"{directory}: the float model's graph is not the one that was saved; {hint}")
        model = cls(captured, recipe, bits, tuple(config["input_shape"]))
        if quantization["operands"] != model._operands():
            raise CheckpointError(f"{directory}: its operands are not what its recipe says; quantize the model again")
        values = {value.name: value for value in model.values}
        quantizers = {
            name: stored_quantizer(tensors, f"{_QUANTIZERS}.{name}", values[name], assignment.spec, directory)
            for name, assignment in model.assignments.items()
            if assignment.spec
        }
        model.insert(quantizers)
        unpack_weights(tensors, quantization["packed"], values, quantizers, directory)
        load_tensors(model.graph_module, tensors, quantization["packed"], directory)
        if quantization.get("arithmetic") is not None:
            model.compute_in_integers(Arithmetic(**quantization["arithmetic"]))
        model.records = [Record(**record) for record in config["records"]]
        model.provenance = {key: config[key] for key in PROVENANCE if key in config}
        return model


def _route_through(graph: Graph, node: Node, target: str) -> None:
    """Let everything that reads `node` read the module `target` of it instead."""
    with graph.inserting_after(node):
        call = graph.call_module(target, (node,))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)


def _finite(value: Any) -> Any:
    """Plain values with null in the place of NaN and infinity, which JSON has not."""
    match value:
        case dict():
            return {key: _finite(each) for key, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


def _prepare(module: nn.Module, incompatible: object) -> None:
    """Called by torch when a state was loaded into a graph, and scales may be others."""
    assert isinstance(module, GraphModule)
    prepare_operations(module)


def _rounds(tensor: torch.Tensor, moved: torch.Tensor) -> bool:
    """Whether a cast loses digits, of the numbers or of what will be computed with them."""
    if torch.promote_types(tensor.dtype, moved.dtype) == moved.dtype:
        return False
    return moved.itemsize < 4 or moved.is_meta or not torch.equal(moved.to(tensor), tensor)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _refuse_other_precision(captured: GraphModule, tensors: dict[str, torch.Tensor], directory: object) -> None:
    """Say so where a model differs from what was saved by its precision."""
    for key, tensor in captured.state_dict().items():
        saved = tensors.get(key)
        if saved is None or not saved.is_floating_point() or saved.dtype == tensor.dtype:
            continue
        here, there = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, saved.dtype))
        raise CheckpointError(
            f"{directory} was saved from a {there} model, this one is {here}; give model.to({saved.dtype})"
        )


def _is_rounded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of functions that processors round apart: masks and whole numbers are the same on all."""
    return tensor.is_floating_point() and not bool((tensor.isinf() | (tensor == tensor.round())).all())


def _tied(module: nn.Module) -> set[int]:
    """The identities of parameters that are stored under more than one name."""
    seen: set[int] = set()
    tied: set[int] = set()
    for _, parameter in module.named_parameters(remove_duplicate=False):
        (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "vitquant": __version__}
    for package in ("timm", "transformers", "torchvision"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

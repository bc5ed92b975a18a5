"""Files of a quantized model: its weights as packed integers, and everything else that restores the same model."""

from __future__ import annotations

import math
import operator
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from vitquant.errors import CheckpointError, RecipeError
from vitquant.graph.captured import CapturedModel
from vitquant.graph.segments import QUANTIZERS
from vitquant.graph.sites import Value
from vitquant.graph.stored import constants
from vitquant.integer_modules import Arithmetic
from vitquant.model import QuantizedModel, Record
from vitquant.model.checkpoint import digest_of, read_checkpoint, write_checkpoint
from vitquant.model.config import PROVENANCE, check_config
from vitquant.model.stored_tensors import load_tensors, stored_quantizer, unpack_weights
from vitquant.packing import pack
from vitquant.recipe import Bits, Recipe
from vitquant.version import __version__


def save(model: QuantizedModel, directory: str | Path, force: bool = False) -> None:
    """Write `model.safetensors` (weights as packed integers, scales, zero points) and `config.json`.

    When the run is killed meanwhile, the directory is left as it was. The loaded model gives bit-identical outputs.

    Raises:
        CalibrationError: a quantizer is missing.
        CheckpointError: the directory cannot be written, or is not empty and `force` is false; or `provenance` does
            not fit the schema of the config.
    """
    tensors, packed = _packed(model)
    config = {
        **model.provenance,
        "versions": _versions(),
        "input_shape": list(model.input_shape),
        "graph_fingerprint": model.index.fingerprint,
        "quantization_config": {
            "quant_method": "vitquant",
            "bits": str(model.bits),
            "arithmetic": None if model.arithmetic is None else asdict(model.arithmetic),
            "recipe": model.recipe.to_dict(),
            "operands": _operands(model),
            "packed": packed,
        },
        "records": [finite(asdict(record)) for record in model.records],
    }
    check_config(config, directory)  # refuse now what loading would refuse
    write_checkpoint(Path(directory), tensors, config, force)


def restore(directory: str | Path, captured: CapturedModel) -> QuantizedModel:
    """The model that `save` wrote, restored onto a capture of the same float model.

    Arguments:
        directory: of the saved model.
        captured: the float model, which becomes the quantized one; its weights are replaced.

    Raises:
        CheckpointError: the files are damaged, or the capture is not of the model that was saved.
    """
    tensors, config = read_checkpoint(Path(directory))
    quantization = check_config(config, directory)["quantization_config"]
    try:
        recipe, bits = Recipe.from_dict(quantization["recipe"]), Bits.parse(quantization["bits"])
    except RecipeError as error:
        raise CheckpointError(f"{directory}: its recipe: {error}") from None
    if captured.index.fingerprint != config["graph_fingerprint"]:
        _refuse_other_precision(captured.graph_module, tensors, directory)
        saved, here = config["versions"].get("torch"), torch.__version__
        hint = f"it was saved with torch {saved}, this is {here}" if saved != here else "give that model"
        raise CheckpointError(f"{directory}: the float model's graph is not the one that was saved; {hint}")
    model = QuantizedModel(captured, recipe, bits)
    if quantization["operands"] != _operands(model):
        raise CheckpointError(f"{directory}: its operands are not what its recipe says; quantize the model again")
    values = {value.name: value for value in model.values}
    quantizers = {
        name: stored_quantizer(tensors, f"{QUANTIZERS}.{name}", values[name], assignment.spec, directory)
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


def stored_bytes(model: QuantizedModel) -> dict[str, int]:
    """The size in bytes of each tensor that `save` writes, by its key.

    Raises:
        CalibrationError: a quantizer is missing.
    """
    return {key: tensor.nbytes for key, tensor in _packed(model)[0].items()}


def digest(model: QuantizedModel) -> str:
    """The identity of a model: a sha256 over the tensors that are saved, the quantizers' specs and the graph.

    It is the same for a model and for one loaded from its files.

    Raises:
        CalibrationError: a quantizer is missing.
    """
    arithmetic = None if model.arithmetic is None else asdict(model.arithmetic)
    described = {"graph": model.index.fingerprint, "operands": _operands(model), "arithmetic": arithmetic}
    return digest_of(_packed(model)[0], described)


def float_digest(model: CapturedModel) -> str:
    """A digest of a captured float model's tensors and graph."""
    return digest_of(model.graph_module.state_dict(), {"graph": model.index.fingerprint})


def facts(model: QuantizedModel) -> dict[str, Any]:
    """The facts about a model that every export holds: recipe, bits, digest and preprocessing, as plain values."""
    preprocessing = model.provenance.get("preprocessing")
    known = {} if preprocessing is None else {"preprocessing": preprocessing}
    return {"recipe": model.recipe.name, "bits": str(model.bits), "model": digest(model), **known}


def _packed(model: QuantizedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that are saved, and the operand and shape of each packed one, by its key."""
    model.require_calibrated()
    quantizers = model.quantizers
    tensors = {name: tensor.clone() for name, tensor in model.graph_module.state_dict().items()}
    computed = constants(model.graph_module)
    tensors |= {name: tensor.clone() for name, tensor in computed.items() if _is_rounded(tensor)}
    packed = {}
    for value in _packable(model):
        quantizer, weight = quantizers[value.name], model.parameter(value).detach()
        codes = quantizer.encode(weight)
        if not torch.equal(quantizer.encode(quantizer.decode(codes, weight.dtype)), codes):
            continue  # bfloat16 cannot represent this grid, so that only the original weight encodes to these codes
        tensors[str(value.parameter)] = pack(codes, quantizer.spec.bits)
        packed[str(value.parameter)] = {"operand": value.name, "shape": list(value.shape)}
    return tensors, packed


def _operands(model: QuantizedModel) -> dict[str, Any]:
    """The rule and the spec of every value, as plain values."""
    return {
        name: {"rule": assignment.rule, "spec": assignment.spec.to_dict() if assignment.spec else None}
        for name, assignment in model.assignments.items()
    }


def _packable(model: QuantizedModel) -> list[Value]:
    """The weights that only one quantized operand reads, so that saving their integer codes is enough."""
    uses: dict[int, int] = {}
    for node in model.graph_module.graph.nodes:
        if node.op == "get_attr":
            tensor = operator.attrgetter(str(node.target))(model.graph_module)
            uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    tied, quantizers = _tied(model.graph_module), model.quantizers
    return [
        value
        for value in model.values
        if value.name in quantizers
        and value.parameter is not None
        and value.readers[0].operand == "weight"
        and uses[id(model.parameter(value))] == 1
        and id(model.parameter(value)) not in tied
    ]


def finite(value: Any) -> Any:
    """Plain values with None in place of NaN and infinity, which JSON cannot represent."""
    match value:
        case dict():
            return {key: finite(each) for key, each in value.items()}
        case list() | tuple():
            return [finite(each) for each in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


def _refuse_other_precision(captured: GraphModule, tensors: dict[str, torch.Tensor], directory: object) -> None:
    """Refuse a float model whose dtype is not that of the model that was saved, naming both."""
    for key, tensor in captured.state_dict().items():
        saved = tensors.get(key)
        if saved is None or not saved.is_floating_point() or saved.dtype == tensor.dtype:
            continue
        here, there = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, saved.dtype))
        raise CheckpointError(
            f"{directory} was saved from a {there} model, this one is {here}; give model.to({saved.dtype})"
        )


def _is_rounded(tensor: torch.Tensor) -> bool:
    """Whether a computed constant may be rounded differently on another processor, unlike masks and whole numbers."""
    return tensor.is_floating_point() and not bool((tensor.isinf() | (tensor == tensor.round())).all())


def _tied(module: nn.Module) -> set[int]:
    """The `id` of each parameter that is stored under more than one name."""
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

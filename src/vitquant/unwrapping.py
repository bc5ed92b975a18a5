"""Unwrapping a plain module, or one line on how to get it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.export import ExportedProgram
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from vitquant.errors import ModelError
from vitquant.quantizers import Quantizer

_MERGE = "give model.merge_and_unload()"
_GATHER = "gather a full state dict (torch.distributed.checkpoint.state_dict.get_model_state_dict) into the plain model"


def unwrapped(model: Any) -> nn.Module:
    """The module inside of all wrappers, which has the state-dict keys that the user knows.

    Wrappers are `torch.compile`, DataParallel, DistributedDataParallel, AveragedModel and timm's ModelEma, also nested.

    Arguments:
        model: a module, wrapped or not; it is not changed.

    Raises:
        ModelError: it is not a module, or one that cannot be captured: scripted, exported, sharded, with adapters,
            quantized already, or without values (on the meta device, or lazy); the message says how to get a plain
            module.
    """
    while True:
        if type(model).__module__ == "timm.utils.model_ema":
            model = getattr(model, "module", getattr(model, "ema", None))
        elif isinstance(model, OptimizedModule):
            model = model._orig_mod  # pyright: ignore[reportPrivateUsage]
        elif isinstance(model, DataParallel | DistributedDataParallel | AveragedModel):
            model = model.module
        else:
            break
    if reason := _why_not(model):
        raise ModelError(reason)
    _refuse_tensors(model)
    return model


def _why_not(model: Any) -> str | None:
    """Why a model cannot be captured, and what to give instead; None if it can."""
    kind = type(model).__name__
    if isinstance(model, ExportedProgram):
        return "the model is an ExportedProgram, which fixes what was exported; give the module it was made from"
    if isinstance(model, torch.jit.ScriptModule):
        return f"the model is a {kind}, compiled by torch.jit; give the module it was made from"
    if isinstance(model, type) and issubclass(model, nn.Module):
        return f"the model is the class {model.__name__}; give an instance of it, {model.__name__}(...)"
    if isinstance(model, str):
        return f"the model is the text {model[:60]!r}; give a module: vitquant.zoo.create(vitquant.ModelSource(NAME))"
    if isinstance(model, Mapping):
        return f"the model is of type {kind}, perhaps a state dict; give the module, after model.load_state_dict(...)"
    if not isinstance(model, nn.Module):
        return f"the model is of type {kind}, not a torch.nn.Module"
    if hasattr(model, "merge_and_unload"):
        return f"the model is a {kind} with adapters beside its weights; {_MERGE}"
    if kind in ("FullyShardedDataParallel", "FSDP") or hasattr(model, "unshard"):
        return f"the model is sharded by FSDP, a part of it in each process; {_GATHER}"
    if isinstance(model, torch.fx.GraphModule) and hasattr(model, "_guards_fn"):
        return "the model is the module of an ExportedProgram, which fixes its input; give the one it was made from"
    if any(
        type(part).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic")) for part in model.modules()
    ):
        return "the model is quantized by torch.ao already; give the float model"
    if any(isinstance(part, Quantizer) for part in model.modules()):
        return "the model is quantized already; give the float model"
    if scripted := [name for name, part in model.named_modules() if _is_scripted(part)]:
        return f"{scripted[0]} is compiled by torch.jit; give a model of the modules it was made from"
    return None


def _is_scripted(part: nn.Module) -> bool:
    return isinstance(part, torch.jit.ScriptModule) and not isinstance(part, torch.jit.TracedModule)


def _refuse_tensors(model: nn.Module) -> None:
    """Refuse tensors that are not plain strided tensors with values, and name the first."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    parameters = {id(parameter) for parameter in model.parameters()}
    for name, tensor in tensors:
        if is_lazy(tensor):
            raise ModelError(f"{name} has no shape yet (a lazy module); run the model on one batch first")
        if tensor.is_meta:
            raise ModelError(f"{name} is on the meta device and holds no values; load the weights before, all of them")
        if tensor.layout is not torch.strided:
            raise ModelError(f"{name} is sparse; give model.{name}.to_dense() in its place")
        if tensor.is_inference():
            raise ModelError(
                f"{name} was made under torch.inference_mode, and cannot be exported; create the model outside"
            )
        if type(tensor).__name__ == "DTensor":
            raise ModelError(f"{name} is a part of a distributed tensor; {_GATHER}")
        if id(tensor) in parameters and not tensor.is_floating_point():
            raise ModelError(f"{name} holds {str(tensor.dtype).removeprefix('torch.')} numbers; give the float model")

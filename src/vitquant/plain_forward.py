"""A context for capturing, in which a forward pass uses neither fused paths nor compiled modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule

# The settings below are global, and a module's mode is shared by all threads: only one capture at a time.
_SWITCHES = threading.RLock()


@contextmanager
def plain_forward(model: nn.Module) -> Generator[None]:
    """A context in which a model uses plain operators, in evaluation mode without gradients; settings are restored.

    PyTorch's fused inference paths (`torch.backends.mha`) are off, `torch.compile` is ignored, and
    `nn.TransformerEncoder` and `nn.TransformerDecoder` do not inspect the values of a mask to see if it is causal.
    """
    with _SWITCHES, ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(_without_fast_paths())
        stack.enter_context(_without_compiled_calls(model))
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder):
                stack.enter_context(_hinted(module, "is_causal", place=3))
            elif isinstance(module, nn.TransformerDecoder):
                stack.enter_context(_hinted(module, "tgt_is_causal", place=6))
        stack.enter_context(torch.no_grad())
        yield


def takes_nested_tensors(model: nn.Module) -> bool:
    """Whether a module of the model may compute on nested tensors, which leave zeros at masked tokens."""
    return any(isinstance(part, nn.TransformerEncoder) and part.use_nested_tensor for part in model.modules())


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode; afterwards the mode of each submodule is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _without_fast_paths() -> Generator[None]:
    """Switch off the fast path of torch's attention and encoder layers, which is a single fused operator."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _without_compiled_calls(model: nn.Module) -> Generator[None]:
    """Run submodules without compilation, whether compiled in place (`part.compile()`) or by `torch.compile(part)`."""
    plain: list[tuple[nn.Module, str, Callable[..., Any] | None]] = []
    for module in model.modules():
        if isinstance(module, OptimizedModule):
            plain.append((module, "forward", module._orig_mod.__call__))  # pyright: ignore[reportPrivateUsage]
        elif module._compiled_call_impl is not None:  # pyright: ignore[reportPrivateUsage]
            plain.append((module, "_compiled_call_impl", None))
    before = [(module, name, getattr(module, name)) for module, name, _ in plain]
    try:
        for module, name, call in plain:
            setattr(module, name, call)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def _hinted(module: nn.Module, hint: str, place: int) -> Generator[None]:
    """Pass `hint=False` to a stack of layers unless its caller gives the hint that its mask is causal.

    The mask is applied anyway. Without a hint the stack compares the mask's values with those of a causal mask, and
    control flow that depends on values cannot be captured.
    """

    def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) > place or kwargs.get(hint) is not None:
            return args, kwargs
        return args, {**kwargs, hint: False}

    handle = module.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()

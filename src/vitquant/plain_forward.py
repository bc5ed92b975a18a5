"""A forward pass as its modules are written, for the time of a capture: no fused paths, nothing compiled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule

# The switches below are the process's, and a module's mode is everybody's who holds it: one capture at a time.
_SWITCHES = threading.RLock()


@contextmanager
def plain_forward(model: nn.Module) -> Generator[None]:
    """Let a model compute by plain operators, in evaluation mode and without gradients; all is given back afterwards.

    PyTorch's fused inference paths (`torch.backends.mha`) are off, `torch.compile` is ignored, and
    `nn.TransformerEncoder` and `nn.TransformerDecoder` do not look into a mask to see whether it is causal.
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
    """Whether a part of a model may compute on nested tensors, which leave zeros where tokens are masked."""
    return any(isinstance(part, nn.TransformerEncoder) and part.use_nested_tensor for part in model.modules())


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode; each submodule gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _without_fast_paths() -> Generator[None]:
    """Attention and encoder layers of torch, which are one fused operator each otherwise, are what they consist of."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _without_compiled_calls(model: nn.Module) -> Generator[None]:
    """Parts that were compiled, in place (`part.compile()`) or wrapped (`torch.compile(part)`), run as written."""
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
    """A stack of layers is told that its mask need not be causal, where its caller does not say that it is.

    The mask is applied all the same. Otherwise the stack compares its values with those of a causal mask, and a
    graph that depends on values cannot be captured.
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

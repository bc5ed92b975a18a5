"""Matrix products of integers: in int64, the definition, or in floating point where that is proved to be exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vitquant.program.instructions import IntegerProgram
from vitquant.program.ranges import Terms, prove_terms

# Chooses the dtype of each instruction's products, by its output; every choice gives the same integers.
Products = Callable[[IntegerProgram], Mapping[str, torch.dtype]]


def exact_int64(program: IntegerProgram) -> Mapping[str, torch.dtype]:
    """The definition: products and sums of 64-bit integers."""
    return {instruction.output: torch.int64 for instruction in program.instructions}


def exact_products(program: IntegerProgram) -> Mapping[str, torch.dtype]:
    """For each instruction the fastest dtype that is exact for any image."""
    return {name: exact_dtype(terms) for name, terms in prove_terms(program).items()}


def exact_dtype(terms: Terms) -> torch.dtype:
    """float32 below 2**24, float64 below 2**53, int64 above: every partial sum is then exact in the dtype.

    The bound is on the sum of absolute values, and so holds for any order of summation. float32 is used only for
    operands of at most 8 significant bits, which stay exact if torch or oneDNN is set to multiply float32 in bfloat16
    or TF32.
    """
    if terms.total < 2**24 and terms.digits <= 8:
        return torch.float32
    return torch.float64 if terms.total < 2**53 else torch.int64


def operand(x: Tensor, zero: int | Tensor | None, dtype: torch.dtype) -> Tensor:
    """x - zero in a dtype for products; on devices other than the CPU float64 replaces float32, which may be inexact.

    Arguments:
        x: any integer dtype.
        zero: broadcastable to x; None for 0.
    """
    if dtype is torch.float32 and x.device.type != "cpu":
        dtype = torch.float64
    if zero is None or (isinstance(zero, int) and zero == 0):
        return x.to(dtype)
    return x.to(dtype, copy=True).sub_(zero)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias: (..., outputs) from (..., channels), (outputs, channels) and (outputs,) of one dtype."""
    return functional.linear(x, weight, bias) if x.is_floating_point() else _plus(torch.matmul(x, weight.T), bias)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
    """The convolution of (batch, channels, height, width) with the stride, padding, dilation and groups of `geometry`.

    It is computed as a matrix product in every dtype, since libraries convolve float32 by transforms that round.
    """
    windows = functional.pad(x, (geometry.padding[1],) * 2 + (geometry.padding[0],) * 2)
    for axis, (size, step, apart) in enumerate(zip(weight.shape[2:], geometry.stride, geometry.dilation, strict=True)):
        windows = windows.unfold(2 + axis, (size - 1) * apart + 1, step)[..., ::apart]
    images, rows, columns = x.shape[0], *windows.shape[2:4]
    patches = windows.permute(0, 2, 3, 1, 4, 5).reshape(images, rows * columns, geometry.groups, -1).transpose(1, 2)
    kernel = weight.reshape(geometry.groups, weight.shape[0] // geometry.groups, -1)
    product = torch.matmul(patches, kernel.mT).mT.reshape(images, -1, rows, columns)
    return _plus(product, None if bias is None else bias.view(-1, 1, 1))


def _plus(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias

"""Matrix products of integers: in int64, which defines them, or in floating point where that is proved to be exact."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional


class Products(Protocol):
    """Ways to compute the same integers; operands and results are int64."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x @ weight.T + bias."""
        ...

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
        """The convolution with the stride, padding, dilation and groups of `geometry`."""
        ...

    def matmul(self, left: Tensor, right: Tensor) -> Tensor:
        """left @ right."""
        ...


class _Int64:
    """The definition: products and sums of 64-bit integers."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product = torch.matmul(x, weight.T)
        return product if bias is None else product + bias

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
        columns = _patches(x, weight.shape[2:], geometry)
        groups, outputs = geometry.groups, weight.shape[0]
        kernel = weight.reshape(groups, outputs // groups, -1)
        product = torch.matmul(kernel, columns.unflatten(1, (groups, -1))).flatten(1, 2)
        rows = _size(x.shape[2], weight.shape[2], geometry, 0)
        product = product.unflatten(2, (rows, -1))
        return product if bias is None else product + bias.view(-1, 1, 1)

    def matmul(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.matmul(left, right)


class _Float:
    """float32 below 2**24, float64 below 2**53, int64 above: every partial sum is then an integer that it holds.

    The bound is on the sum of absolute products, so no order of summation can leave it.
    """

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product = self.matmul(x, weight.T)
        return product if bias is None else product + bias

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
        dtype = exact_dtype(x, weight, weight[0].numel())
        if dtype is torch.int64:
            return exact_int64.convolution(x, weight, bias, geometry)
        product = functional.conv2d(
            x.to(dtype), weight.to(dtype), None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        ).to(torch.int64)
        return product if bias is None else product + bias.view(-1, 1, 1)

    def matmul(self, left: Tensor, right: Tensor) -> Tensor:
        dtype = exact_dtype(left, right, left.shape[-1])
        return torch.matmul(left.to(dtype), right.to(dtype)).to(torch.int64)


def exact_dtype(left: Tensor, right: Tensor, summed: int) -> torch.dtype:
    """The narrowest dtype in which sums of so many products of these operands are exact."""
    bound = summed * int(left.abs().amax()) * int(right.abs().amax())
    return torch.float32 if bound < 2**24 else torch.float64 if bound < 2**53 else torch.int64


def _patches(x: Tensor, kernel: torch.Size, geometry: Any) -> Tensor:
    """The values under each position of a kernel: (batch, channels * kernel size, positions)."""
    padded = functional.pad(x, (geometry.padding[1],) * 2 + (geometry.padding[0],) * 2)
    rows, columns = (_size(x.shape[2 + axis], kernel[axis], geometry, axis) for axis in (0, 1))
    (down, right), (high, wide) = geometry.stride, geometry.dilation
    parts = [
        padded[
            :,
            :,
            i * high : i * high + (rows - 1) * down + 1 : down,
            j * wide : j * wide + (columns - 1) * right + 1 : right,
        ]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return torch.stack(parts, 2).flatten(3).flatten(1, 2)


def _size(size: int, kernel: int, geometry: Any, axis: int) -> int:
    extent = geometry.dilation[axis] * (kernel - 1) + 1
    return (size + 2 * geometry.padding[axis] - extent) // geometry.stride[axis] + 1


exact_int64: Products = _Int64()
exact_products: Products = _Float()

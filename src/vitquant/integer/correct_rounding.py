"""Correctly rounded arithmetic on constants, with the same results on every processor and version of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from math import fsum
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vitquant.integer import elementary
from vitquant.integer.elementary import Real, rounded

_aten = torch.ops.aten


class CorrectRounding(TorchDispatchMode):
    """A context in which torch computes constants reproducibly, with the same results on every processor.

    torch's elementwise additions, multiplications and divisions are correctly rounded on every processor, but its
    elementary functions and its order of summation differ between processors. Inside this context elementary functions,
    sums, means and matrix products are computed on real numbers and rounded to float64, then to their own dtype. All
    other float32 operations are computed in float64 and then rounded, which hides a difference in float64's last digit
    except in about one of 2**28 cases.

    Pitfall: elementary functions and sums take a Python call for each element; use it for constants, not for images.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = dict(kwargs or {})
        if func in _FUNCTIONS:
            return _elementwise(func, args, given)
        if func in _SUMS and _all_finite(args):
            return _SUMS[func](*args, **given)
        if func is _aten.log_sigmoid_forward.default:  # the form that log_sigmoid takes under autograd
            return _elementwise(_aten.log_sigmoid.default, args, given), args[0].new_empty(0)
        if func.is_view or func._schema.is_mutable or func.overloadpacket in (_aten._to_copy, _aten.to):
            return func(*args, **given)
        with self:  # the operators of a decomposition are computed by the cases above
            parts = func.decompose(*args, **given)
        return _wider(func, args, given) if parts is NotImplemented else parts


def _gelu(approximate: str = "none") -> Real:
    return elementary.gelu if approximate == "none" else elementary.gelu_by_tanh


def _softplus(beta: float = 1, threshold: float = 20) -> Real:
    steepness, most = Decimal(beta), Decimal(threshold)
    return lambda x: x if x * steepness > most else elementary.softplus(x * steepness) / steepness


def _elu(alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Real:
    a, b, c = map(Decimal, (alpha, scale, input_scale))
    return lambda x: x * b if x > 0 else elementary.expm1(x * c) * a * b


def _hardswish() -> Real:
    return lambda x: x * min(max(x + 3, Decimal(0)), Decimal(6)) / 6


def _hardsigmoid() -> Real:
    return lambda x: min(max(x + 3, Decimal(0)), Decimal(6)) / 6


# For each operator a factory of the real function, called with the operator's arguments after the first.
_FUNCTIONS: dict[Any, Callable[..., Real]] = {
    _aten.gelu.default: _gelu,
    _aten.softplus.default: _softplus,
    _aten.elu.default: _elu,
    _aten.celu.default: lambda alpha=1: _elu(alpha, 1, 1 / alpha),
    _aten.hardswish.default: _hardswish,
    _aten.hardsigmoid.default: _hardsigmoid,
    _aten.log_sigmoid.default: lambda: elementary.log_sigmoid,
    **{
        getattr(_aten, name).default: lambda name=name: getattr(elementary, name)
        for name in (
            "exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "erf", "sigmoid", "tanh", "silu", "mish",
        )
    },
}  # fmt: skip


def _elementwise(func: Any, args: Any, given: Mapping[str, Any]) -> Tensor:
    x, *rest = args
    found = func(x, *rest, **given)  # gives the dtype, and the values at NaN and infinity
    finite = torch.isfinite(x)
    values = rounded(_FUNCTIONS[func](*rest, **given), x[finite].tolist())
    found[finite] = torch.tensor(values, dtype=torch.float64, device=x.device).to(found.dtype)
    return found


def _all_finite(args: Any) -> bool:
    return all(bool(torch.isfinite(each).all()) for each in args if isinstance(each, Tensor))


def _rows(rows: Iterable[Iterable[float]], like: Tensor) -> Tensor:
    return torch.tensor([fsum(row) for row in rows], dtype=torch.float64, device=like.device)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product in float64; for float32 factors it is rounded only once."""
    columns = right.double().T
    return torch.stack([_rows((row * columns).tolist(), left) for row in left.double()])


def _mm(left: Tensor, right: Tensor) -> Tensor:
    return _product(left, right).to(left.dtype)


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return (bias.double() * beta + _product(left, right) * alpha).to(left.dtype)


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    return torch.stack([_mm(*pair) for pair in zip(left, right, strict=True)])


def _sum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    return _summed(x, dim, keepdim)[0].to(dtype or (x.dtype if x.is_floating_point() else torch.int64))


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    total, count = _summed(x, dim, keepdim)
    return (total / count).to(dtype or x.dtype)


def _summed(x: Tensor, dim: Any, keepdim: bool) -> tuple[Tensor, int]:
    """The sum over some axes, or over all if none are named, in float64, and the number of elements in each sum."""
    axes = sorted(axis % x.ndim for axis in ([dim] if isinstance(dim, int) else dim or range(x.ndim)))
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    rows = x.double().permute(*kept, *axes).flatten(len(kept)) if axes else x.double().unsqueeze(-1)
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape) if keepdim or axis in kept]
    return _rows(rows.reshape(-1, rows.shape[-1]).tolist(), x).view(shape), rows.shape[-1]


_SUMS: dict[Any, Callable[..., Tensor]] = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.bmm.default: _bmm,
    _aten.sum.default: _sum,
    _aten.sum.dim_IntList: _sum,
    _aten.mean.default: _mean,
    _aten.mean.dim: _mean,
}


def _wider(func: Callable[..., Any], args: Any, given: Any) -> Any:
    """A call with float32 tensors computed in float64, and its result rounded to float32; other calls unchanged."""
    tensors: list[Tensor] = []

    def widened(x: Tensor) -> Tensor:
        tensors.append(x)
        return x.double() if x.dtype == torch.float32 else x

    found = func(*tree_map_only(Tensor, widened, args), **tree_map_only(Tensor, widened, given))
    types = {each.dtype for each in tensors}
    if torch.float32 not in types or torch.float64 in types:
        return found
    return tree_map_only(Tensor, lambda x: x.float() if x.dtype == torch.float64 else x, found)

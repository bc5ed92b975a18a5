"""torch's arithmetic on constants, so that every processor and every version of torch gives the same."""

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
    """Inside it torch computes constants that are the same everywhere.

    What torch adds, multiplies and divides element by element is rounded correctly on every processor; its elementary
    functions, and the order in which it sums, are not the same. Inside, elementary functions, sums, means and matrix
    products are those of real numbers, rounded to float64 and then to their own type. All else that would compute in
    float32 does so in float64 and is rounded then, which shows nothing of float64's last digit but once in 2**28.

    Pitfall: a Python call for each element of an elementary function or a sum; for constants, not for images.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = dict(kwargs or {})
        if func in _FUNCTIONS:
            return _elementwise(func, args, given)
        if func in _SUMS and _all_finite(args):
            return _SUMS[func](*args, **given)
        if func is _aten.log_sigmoid_forward.default:  # what it is made of where gradients can be asked for
            return _elementwise(_aten.log_sigmoid.default, args, given), args[0].new_empty(0)
        if func.is_view or func._schema.is_mutable or func.overloadpacket in (_aten._to_copy, _aten.to):
            return func(*args, **given)
        with self:  # what is made of other operators is made of those above
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


# For each operator what makes the function from the arguments after the first.
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
    found = func(x, *rest, **given)  # of its type, and what it is of infinity
    finite = torch.isfinite(x)
    values = rounded(_FUNCTIONS[func](*rest, **given), x[finite].tolist())
    found[finite] = torch.tensor(values, dtype=torch.float64, device=x.device).to(found.dtype)
    return found


def _all_finite(args: Any) -> bool:
    return all(bool(torch.isfinite(each).all()) for each in args if isinstance(each, Tensor))


def _rows(rows: Iterable[Iterable[float]], like: Tensor) -> Tensor:
    return torch.tensor([fsum(row) for row in rows], dtype=torch.float64, device=like.device)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product in float64: of float32 numbers it is exact but for one rounding."""
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
    """The sum over some axes, all when none are named, in float64, and of how many elements."""
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
    """The call in float64 where it would be in float32, and its result in float32."""
    tensors: list[Tensor] = []

    def widened(x: Tensor) -> Tensor:
        tensors.append(x)
        return x.double() if x.dtype == torch.float32 else x

    found = func(*tree_map_only(Tensor, widened, args), **tree_map_only(Tensor, widened, given))
    types = {each.dtype for each in tensors}
    if torch.float32 not in types or torch.float64 in types:
        return found
    return tree_map_only(Tensor, lambda x: x.float() if x.dtype == torch.float64 else x, found)

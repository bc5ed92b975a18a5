"""The base class of quantizers: encode, decode, and a differentiable forward that does both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitquant.packing import code_dtype
from vitquant.spec import Granularity, PerAxis, PerHead, PerTensor, QParams, QuantSpec


def channel_axis(granularity: Granularity) -> int | None:
    """The axis along which scales differ, of the tensor as the operation reads it; None for a single scale."""
    match granularity:
        case PerTensor():
            return None
        case PerAxis(axis):
            return axis
        case PerHead():
            return -3


def along_axis(values: Tensor, granularity: Granularity, ndim: int) -> Tensor:
    """Shape one value per channel for broadcasting against an operand.

    Arguments:
        values: (n,) along the granularity's axis, or () which broadcasts as it is.
        granularity: determines the axis.
        ndim: number of axes of the operand.
    """
    axis = channel_axis(granularity)
    if values.ndim == 0 or axis is None:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.view(shape)


class Quantizer(nn.Module):
    """Map real values to integer codes and back, on a grid fixed by a spec and its parameters.

    Quantization is `level = nearest(x / step)`, dequantization `x = level * step`; the scheme defines the step,
    the levels, and the code of each level. The arithmetic is float32 for float32, bfloat16 and float16 operands
    and float64 for float64 ones; only the result is cast.

    Arguments:
        spec: scheme, bits, sign, symmetry and granularity.
        params: scale, zero point and factors; copied, so that the quantizer shares no memory with its observer.

    Pitfalls:
        A bfloat16 result is the grid's value rounded to 8 significant bits. Encoding it again gives the
        same code only while |code - zero_point| <= 128: always for up to 7 bits, for signed symmetric 8
        bits and for powers of two, but not for every unsigned or asymmetric 8-bit code. (float16: 1024.)
        NaN stays NaN in `forward`, but has no code: `encode` of NaN is undefined.
    """

    scale: Tensor
    zero_point: Tensor | None
    factor: Tensor | None

    def __init__(self, spec: QuantSpec, params: QParams) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("scale", params.scale.detach().to(torch.float32).clone())
        for name, value in (("zero_point", params.zero_point), ("factor", params.factor)):
            self.register_buffer(name, None if value is None else value.detach().to(torch.int32).clone())

    def encode(self, x: Tensor) -> Tensor:
        """The codes of `x`: an integer tensor of its shape, of dtype `code_dtype(bits, signed)`."""
        x = x.to(_working_dtype(x.dtype))
        return self._code(self._nearest_level(x / self.step_along(x))).to(code_dtype(self.spec.bits, self.spec.signed))

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that `codes` (any integer dtype) stand for, computed as `forward` does for `dtype`."""
        level = self._level(codes.to(_working_dtype(dtype)))
        return (level * self.step_along(level)).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Round `x` to the grid: `decode(encode(x), x.dtype)` bit for bit, with straight-through gradients.

        The gradient to `x` is 1 inside the range and 0 outside; to `scale`, where that is a parameter,
        level - x / scale inside and the level itself outside (LSQ, Esser et al. 2020, equation 3).
        """
        work = x.to(_working_dtype(x.dtype))
        step = self.step_along(work)
        level = self._nearest_level(work / step)
        in_place = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        return (level.mul_(step) if in_place else level * step).to(x.dtype)

    def reference(self, x: Tensor) -> Tensor:
        """What the float model computes in its place: the identity."""
        return x

    @property
    def integer_bounds(self) -> tuple[int, int]:
        """The smallest and the largest value that `integers` returns."""
        return self.spec.qmin, self.spec.qmax

    def integers(self, codes: Tensor) -> Tensor:
        """The integers that integer arithmetic computes with: the codes themselves where levels are equally spaced."""
        return codes

    def codes_of(self, integers: Tensor) -> Tensor:
        """The codes of integers, the inverse of `integers`."""
        return integers

    def error_bound(self, x: Tensor) -> Tensor:
        """The largest |forward(x) - x| that an `x` inside `range()` can have, elementwise."""
        raise NotImplementedError

    def range(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value on the grid: float32, () or one per channel."""
        raise NotImplementedError

    @property
    def step(self) -> Tensor:
        """The step, the distance between neighbouring levels: float32, () or one per channel."""
        return self.scale

    def step_along(self, like: Tensor) -> Tensor:
        """The step shaped for broadcasting against a tensor, in the tensor's dtype."""
        return self._along(self.step, like)

    def extra_repr(self) -> str:
        return repr(self.spec)

    def _nearest_level(self, ratio: Tensor) -> Tensor:
        """The level nearest to `ratio` = x / step, differentiable; without gradients perhaps in its memory."""
        raise NotImplementedError

    def _code(self, level: Tensor) -> Tensor:
        """The code of a level, as a float."""
        raise NotImplementedError

    def _level(self, code: Tensor) -> Tensor:
        """The level of a code, both as floats."""
        raise NotImplementedError

    def _along(self, values: Tensor, like: Tensor) -> Tensor:
        return along_axis(values, self.spec.granularity, like.ndim).to(like.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        # model.half() must not round the scale: a cast moves parameters to its device and no more.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

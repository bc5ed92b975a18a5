"""Modules that `torch.onnx.export` writes as the ONNX operators of a quantizer.

Each replaces a quantizer, or an operation on codes, in a graph that is about to be exported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitquant.errors import ExportError
from vitquant.integer_modules import IntegerOperation
from vitquant.quantizers import Quantizer
from vitquant.quantizers.logarithmic import LogarithmicQuantizer, power, threshold
from vitquant.quantizers.quantizer import along_axis, channel_axis
from vitquant.quantizers.twin_uniform import TwinLevels, TwinUniformQuantizer
from vitquant.quantizers.uniform import UniformQuantizer

OPERAND, STORED_AS = "vitquant.operand", "vitquant.type"  # keys of a node's metadata


def stored_bits(bits: int) -> int:
    """The bits of the smallest ONNX integer that holds codes of `bits` bits: 4, 8 or 16."""
    return next(width for width in (4, 8, 16) if bits <= width)


class LinearOperators(nn.Module):
    """The scale and zero point of `QuantizeLinear` and `DequantizeLinear`, one for all or one per channel.

    torch has no 4-bit types: their codes are int8 or uint8 until export, and the metadata has the name of their type.

    Attributes:
        signed, width: the type of the codes: INT4 to UINT16.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, name: str, scale: Tensor, zero: Tensor, axis: int | None, signed: bool, width: int) -> None:
        super().__init__()
        if scale.numel() == 1:
            scale, zero, axis = scale.reshape(()), zero.reshape(()), None
        self.signed, self.width = signed, width
        self._type = getattr(torch, ("int" if signed else "uint") + str(max(8, width)))
        self._attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
        self._metadata = {OPERAND: name, STORED_AS: ("INT" if signed else "UINT") + str(width)}
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero", zero.expand(scale.shape).to(self._type).clone())

    def _quantize(self, x: Tensor) -> Tensor:
        return self._node("QuantizeLinear", x, self._type)

    def _dequantize(self, codes: Tensor) -> Tensor:
        return self._node("DequantizeLinear", codes, torch.float32)

    def _node(self, operator: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.onnx.ops.symbolic(
            operator, (x, self.scale, self.zero), self._attributes,
            dtype=dtype, shape=x.shape, metadata_props=self._metadata,
        )  # fmt: skip


class QuantizeDequantize(LinearOperators):
    """A quantizer on equally spaced levels: `QuantizeLinear` and `DequantizeLinear` with one scale.

    Runtimes fuse these pairs as if the scale of an activation were always a single number, so power-of-two factors are
    applied outside of them, as exact products. Where codes do not fill their type, values beyond the first and the last
    level are clipped before; the bounds are levels, so that nothing is rounded twice.

    Arguments:
        name: of the quantized value.
        quantizer: on equally spaced levels.
        rank: the number of axes of the value.

    Raises:
        ExportError: the quantizer has several scales that are not powers of two apart.
    """

    factors: Tensor

    def __init__(self, name: str, quantizer: UniformQuantizer, rank: int) -> None:
        spec, scale, zero = quantizer.spec, quantizer.scale, quantizer.zero_point
        assert zero is not None
        if scale.numel() != 1:
            raise ExportError(
                f"{name} has {scale.numel()} scales, and runtimes take one for what images change; use per = tensor"
            )
        width = 8 if spec.bits < 4 else stored_bits(spec.bits)  # runtimes quantize activations to at least 4 bits
        super().__init__(name, scale, zero, None, spec.signed, width)
        self._factored = quantizer.factor is not None
        if quantizer.factor is not None:
            factors = (2**quantizer.factor).float()
            self.register_buffer("factors", along_axis(factors, spec.granularity, rank).clone())
        self._ends = None
        if spec.bits < width:
            self._ends = tuple(((code - zero) * scale).item() for code in (spec.qmin, spec.qmax))

    def forward(self, x: Tensor) -> Tensor:
        """The value on its grid."""
        if self._factored:
            x = x * (1 / self.factors)
        if self._ends is not None:
            x = x.clamp(*self._ends)
        x = self._dequantize(self._quantize(x))
        return x * self.factors if self._factored else x


class StoredCodes(LinearOperators):
    """A quantized value that does not depend on the images: its codes, and `DequantizeLinear`.

    Arguments:
        name: of the quantized value.
        quantizer: on equally spaced levels.
        value: the tensor.
        transposed: whether to swap the axes of a matrix, as for the weight of a layer that becomes a product.
    """

    codes: Tensor

    def __init__(self, name: str, quantizer: UniformQuantizer, value: Tensor, transposed: bool = False) -> None:
        spec, axis, zero = quantizer.spec, channel_axis(quantizer.spec.granularity), quantizer.zero_point
        assert zero is not None
        axis = None if axis is None else axis % value.ndim
        with torch.no_grad():
            codes = quantizer.encode(value)
        if transposed:
            codes, axis = codes.t(), None if axis is None else 1 - axis
        super().__init__(name, quantizer.step, zero, axis, spec.signed, stored_bits(spec.bits))
        self.register_buffer("codes", codes.to(self._type).contiguous())

    def forward(self) -> Tensor:
        """The real values of the codes."""
        return self._dequantize(self.codes)


class NearestPower(nn.Module):
    """A quantizer on powers of two or of its square root, by comparisons and exact products only, without a logarithm.

    The level is found by binary search: each comparison with a threshold halves the number of candidate levels. Levels
    and thresholds are those of the quantizer. The lowest bit of the code is found last, so that the factor sqrt(1/2) is
    only applied to powers of two.

    Arguments:
        quantizer: on powers of two or of its square root.
        rank: the number of axes of the value.

    Pitfall: with 7 and 8 bits the last levels and thresholds are subnormal numbers, which runtimes may flush to zero.
    """

    scale: Tensor

    def __init__(self, quantizer: LogarithmicQuantizer, rank: int) -> None:
        super().__init__()
        self._steps, self._powers = quantizer.steps, quantizer.zero_code  # codes 0 .. zero_code - 1 are powers
        self._scaled = bool((quantizer.scale != 1).any())
        self.register_buffer("scale", along_axis(quantizer.scale.detach(), quantizer.spec.granularity, rank).clone())

    def forward(self, x: Tensor) -> Tensor:
        """The value on its grid."""
        ratio = x / self.scale if self._scaled else x
        level = torch.ones(())
        levels = 1 << (self._powers - 1).bit_length()
        while levels > 1:
            levels //= 2
            below = ratio < level * self._threshold(levels - 1)
            level = torch.where(below, level * power(levels, self._steps), level)
        level = torch.where(ratio < self._threshold(self._powers - 1), 0.0, level)
        return level * self.scale if self._scaled else level

    def _threshold(self, code: int) -> float:
        return threshold(code, self._steps, torch.float32)


class NearestTwin(nn.Module):
    """A quantizer on twin steps, by a quotient, two roundings and exact products, since ONNX has no operator for it.

    Arguments:
        quantizer: on twin steps.
        rank: the number of axes of the value.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, quantizer: TwinUniformQuantizer, rank: int) -> None:
        super().__init__()
        assert quantizer.zero_point is not None
        self._spec = quantizer.spec
        for name, value in (("scale", quantizer.scale), ("zero", quantizer.zero_point.float())):
            self.register_buffer(name, along_axis(value.detach(), quantizer.spec.granularity, rank).clone())

    def forward(self, x: Tensor) -> Tensor:
        """The value on its grid."""
        return TwinLevels.of(self._spec, self.zero).nearest(torch.round(x / self.scale)) * self.scale


class FloatOperation(nn.Module):
    """An operation on codes as the float operation that runtimes know and fuse.

    Arguments:
        operation: the operation of the simulation.
    """

    def __init__(self, operation: IntegerOperation) -> None:
        super().__init__()
        self._operation = (operation,)  # a tuple, so that it is not a submodule and its quantizers are not exported

    def forward(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        """The float result."""
        return self._operation[0].reference(x, *parameters)


def quantizer_operator(name: str, quantizer: Quantizer, rank: int) -> nn.Module:
    """The module that replaces the quantizer of a value that depends on the images."""
    if isinstance(quantizer, LogarithmicQuantizer):
        return NearestPower(quantizer, rank)
    if isinstance(quantizer, TwinUniformQuantizer):
        return NearestTwin(quantizer, rank)
    assert isinstance(quantizer, UniformQuantizer)
    return QuantizeDequantize(name, quantizer, rank)

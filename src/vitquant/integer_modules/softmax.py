"""Softmax on codes."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

import torch
from torch import Tensor

from vitquant.integer.arithmetic import rescaling
from vitquant.integer.elementary import digits, log2
from vitquant.integer.exponential import (
    OCTAVE_BITS,
    VALUE_BITS,
    Exponential,
    exact_exponential,
    polynomial_exponential,
)
from vitquant.integer.softmax import (
    LARGEST_OFFSET,
    distances,
    integer_softmax,
    log_int_softmax,
    published_log_int_softmax,
)
from vitquant.integer_modules.operation import IntegerOperation, NotIntegerError
from vitquant.quantizers import Quantizer
from vitquant.quantizers.logarithmic import Log2Quantizer, LogarithmicQuantizer
from vitquant.quantizers.uniform import UniformQuantizer
from vitquant.spec import Logarithmic, PerTensor, PowerOfTwoFactor


class _Softmax(IntegerOperation):
    """The base class of all forms.

    Arguments:
        source, result: see `IntegerOperation`. A score of minus infinity is a masked entry.
        exponential: `exact` or `polynomial`.
        masked: whether scores may be masked.
    """

    kind = "softmax"
    values: Tensor
    octaves: Tensor

    def __init__(self, source: Quantizer, result: Quantizer, exponential: str, masked: bool = True) -> None:
        super().__init__(source, result)
        self.masked = masked
        self._table = exact_exponential if exponential == "exact" else polynomial_exponential

    def check(self, source: Quantizer, result: Quantizer) -> None:
        uniform = isinstance(source, UniformQuantizer) and not isinstance(source.spec.scheme, PowerOfTwoFactor)
        if not uniform or not isinstance(source.spec.granularity, PerTensor):
            raise NotIntegerError("its input has more than one scale, and one table of exponentials serves all scores")

    def reference(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        return torch.softmax(x, -1)

    @property
    def exponential(self) -> Exponential:
        """The table for the scale of the scores."""
        source = self.source
        table = self._table(source.scale.item(), source.spec.qmax - source.spec.qmin + 1)
        return Exponential(table.values.to(source.scale.device), table.octaves.to(source.scale.device))

    def derive(self, width: int, *parameters: Tensor | None) -> Mapping[str, Tensor | int]:
        table = self.exponential
        return {"values": table.values, "octaves": table.octaves}

    def _codes(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        table, codes = Exponential(self.values, self.octaves), self.source.encode(x).to(torch.int64)
        return self.probabilities(distances(codes, torch.isneginf(x) if self.masked else None, table), table)

    def probabilities(self, distance: Tensor, exponential: Exponential) -> Tensor:
        """The result's codes from the distances of the scores below the largest of their row."""
        raise NotImplementedError


class LogIntSoftmax(_Softmax):
    """Softmax with results at powers of two, or of its square root.

    Source: FQ-ViT, Lin et al. 2022, section "Log-Int-Softmax"; the root, RepQ-ViT, Li et al. 2023.
    """

    published = False
    power_offset: int

    def derive(self, width: int, *parameters: Tensor | None) -> Mapping[str, Tensor | int]:
        return {**super().derive(width, *parameters), "power_offset": self.offset}

    def connect(self, source: Quantizer, result: Quantizer) -> None:
        super().connect(source, result)
        powers = "powers of two" if self.powers.steps == 1 else "powers of the root of two"
        self.description = f"table of exponentials, {powers}{' rounded as published' if self.published else ''}"

    def check(self, source: Quantizer, result: Quantizer) -> None:
        super().check(source, result)
        if not isinstance(result, LogarithmicQuantizer):
            raise NotIntegerError("its result is not quantized to powers of two")
        if result.scale.numel() != 1:
            raise NotIntegerError("its result has more than one scale")
        scale, scheme, most = result.scale.item(), result.spec.scheme, VALUE_BITS * result.steps + 1
        most_octaves = LARGEST_OFFSET >> OCTAVE_BITS
        if not 2.0**-most_octaves <= scale <= 2.0**most_octaves:
            raise NotIntegerError(f"the scale of its result, {scale:.3g}, is not between 2**-32 and 2**32")
        if result.zero_code > most:
            fit = (most + 1 - (isinstance(scheme, Logarithmic) and scheme.separate_zero)).bit_length() - 1
            reason = f"its result has {result.spec.bits} bits: the numerators reach 2**-15, which {fit} bits hold"
            raise NotIntegerError(f"{reason} (s{fit} in --bits)")

    @property
    def powers(self) -> LogarithmicQuantizer:
        """The quantizer of the result."""
        assert isinstance(self.result, LogarithmicQuantizer)
        return self.result

    @property
    def offset(self) -> int:
        """The logarithm of the result's scale, in units of the table's octaves."""
        with digits():
            return round(log2(Decimal(self.powers.scale.item())) * 2**OCTAVE_BITS)

    def probabilities(self, distance: Tensor, exponential: Exponential) -> Tensor:
        return log_int_softmax(distance, exponential, self.powers.zero_code, self.powers.steps, self.power_offset)


class PublishedLogIntSoftmax(LogIntSoftmax):
    """`LogIntSoftmax` with the rounding of FQ-ViT's code, which requires powers of two with the largest level 1."""

    published = True

    def check(self, source: Quantizer, result: Quantizer) -> None:
        super().check(source, result)
        if not isinstance(result, Log2Quantizer) or result.scale.item() != 1.0:
            raise NotIntegerError(
                "the published code rounds to powers of two that begin at 1: use the scheme log2 and the observer unit"
            )

    def probabilities(self, distance: Tensor, exponential: Exponential) -> Tensor:
        return published_log_int_softmax(distance, exponential, self.powers.zero_code)


class IntegerSoftmax(_Softmax):
    """Softmax with results on equally spaced levels."""

    description = "table of exponentials, one reciprocal a row"
    multiplier: int
    shift: int

    def derive(self, width: int, *parameters: Tensor | None) -> Mapping[str, Tensor | int]:
        multiplier, shift = self.steps()
        return {**super().derive(width, *parameters), "multiplier": multiplier, "shift": shift}

    def check(self, source: Quantizer, result: Quantizer) -> None:
        super().check(source, result)
        uniform = isinstance(result, UniformQuantizer) and not isinstance(result.spec.scheme, PowerOfTwoFactor)
        if not uniform or not isinstance(result.spec.granularity, PerTensor):
            raise NotIntegerError("its result has more than one scale")

    def probabilities(self, distance: Tensor, exponential: Exponential) -> Tensor:
        result = self.result
        assert result.zero_point is not None
        codes = integer_softmax(distance, exponential, self.multiplier, self.shift)
        return (codes + result.zero_point).clamp(result.spec.qmin, result.spec.qmax)

    def steps(self) -> tuple[int, int]:
        """The multiplier and shift with which multiplier / 2**shift is 1 / scale of the result."""
        found = rescaling(1.0 / self.result.scale.double(), torch.zeros((), dtype=torch.float64))
        return int(found.multiplier), found.shift

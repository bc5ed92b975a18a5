"""Softmax on codes."""

from __future__ import annotations

import torch
from torch import Tensor

from vitquant.integer.arithmetic import rescaling
from vitquant.integer.exponential import Exponential, exact_exponential, polynomial_exponential
from vitquant.integer.softmax import distances, integer_softmax, log_int_softmax, published_log_int_softmax
from vitquant.operations.operation import IntegerOperation, NotIntegerError
from vitquant.quantizers import Quantizer
from vitquant.quantizers.logarithmic import Log2Quantizer
from vitquant.quantizers.uniform import UniformQuantizer
from vitquant.spec import PerTensor, PowerOfTwoFactor


class _Softmax(IntegerOperation):
    """What both forms share.

    Arguments:
        source, result: see `IntegerOperation`. A score of minus infinity is hidden by a mask.
        exponential: `exact` or `polynomial`.
    """

    kind = "softmax"

    def __init__(self, source: Quantizer, result: Quantizer, exponential: str) -> None:
        super().__init__(source, result)
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

    def codes(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        table = self.exponential
        hidden = torch.isneginf(x)
        codes = self.source.encode(x).to(torch.int64)
        return self.probabilities(distances(codes, hidden if bool(hidden.any()) else None, table), table)

    def probabilities(self, distance: Tensor, exponential: Exponential) -> Tensor:
        """The result's codes from distances below the row's largest."""
        raise NotImplementedError


class LogIntSoftmax(_Softmax):
    """Softmax to powers of two.

    Arguments:
        published: with the rounding of FQ-ViT's code.

    Source: FQ-ViT, Lin et al. 2022, section "Log-Int-Softmax".
    """

    def __init__(self, source: Quantizer, result: Quantizer, exponential: str, published: bool = False) -> None:
        super().__init__(source, result, exponential)
        self.published = published
        self.description = "table of exponentials, powers of two" + (" rounded as published" if published else "")

    def check(self, source: Quantizer, result: Quantizer) -> None:
        super().check(source, result)
        if not isinstance(result, Log2Quantizer) or result.scale.numel() != 1 or result.scale.item() != 1.0:
            raise NotIntegerError("its powers of two do not begin at 1: the observer of the probabilities must be unit")
        if result.zero_code > 16:
            raise NotIntegerError(
                f"its result has {result.spec.bits} bits: the table reaches 2**-15, which 4 bits hold"
            )

    def probabilities(self, distance: Tensor, exponential: Exponential) -> Tensor:
        assert isinstance(self.result, Log2Quantizer)
        softmax = published_log_int_softmax if self.published else log_int_softmax
        return softmax(distance, exponential, self.result.zero_code)


class IntegerSoftmax(_Softmax):
    """Softmax to equally spaced levels."""

    description = "table of exponentials, one reciprocal a row"

    def check(self, source: Quantizer, result: Quantizer) -> None:
        super().check(source, result)
        uniform = isinstance(result, UniformQuantizer) and not isinstance(result.spec.scheme, PowerOfTwoFactor)
        if not uniform or not isinstance(result.spec.granularity, PerTensor):
            raise NotIntegerError("its result has more than one scale")

    def probabilities(self, distance: Tensor, exponential: Exponential) -> Tensor:
        result = self.result
        assert result.zero_point is not None
        codes = integer_softmax(distance, exponential, *self.steps())
        return (codes + result.zero_point).clamp(result.spec.qmin, result.spec.qmax)

    def steps(self) -> tuple[int, int]:
        """How many steps of the result a probability of 1 has: multiplier / 2**shift."""
        found = rescaling(1.0 / self.result.scale.double(), torch.zeros((), dtype=torch.float64))
        return int(found.multiplier), found.shift

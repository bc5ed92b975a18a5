"""The base of operations on codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitquant.quantizers import Quantizer


class NotIntegerError(Exception):
    """An operation cannot be computed on codes; the message says why."""


class IntegerOperation(nn.Module):
    """`decode(codes(encode(x)))`: an operation between the quantizer of what it reads and the one of its result.

    It has no tensors of its own. Scales are read from the quantizers at every call, so a method that changes
    them changes this operation too.

    Arguments:
        source: the quantizer of the input. The input is on its grid, so encoding it loses nothing.
        result: the quantizer that stands behind the operation.

    Attributes:
        kind: of its site.
        description: how it is computed, for the report.
        widest_input, widest_result: the most bits that the codes of either may have.

    Raises:
        NotIntegerError: these quantizers do not allow it.
    """

    kind: str
    description: str
    widest_input = widest_result = 8

    def __init__(self, source: Quantizer, result: Quantizer) -> None:
        super().__init__()
        self.connect(source, result)

    def connect(self, source: Quantizer, result: Quantizer) -> None:
        """Take other quantizers.

        Raises:
            NotIntegerError: these do not allow it.
        """
        for quantizer, which, most in ((source, "input", self.widest_input), (result, "result", self.widest_result)):
            if quantizer.spec.bits > most:
                raise NotIntegerError(f"its {which} has {quantizer.spec.bits} bits: above {most} is simulated only")
        self.check(source, result)
        self._ends = (source, result)  # a tuple: they are modules of the graph, not of this operation

    @property
    def source(self) -> Quantizer:
        """The quantizer of the input."""
        return self._ends[0]

    @property
    def result(self) -> Quantizer:
        """The quantizer of the result."""
        return self._ends[1]

    def check(self, source: Quantizer, result: Quantizer) -> None:
        """Refuse quantizers for which there is no integer definition.

        Raises:
            NotIntegerError: it says which and why.
        """
        raise NotImplementedError

    def codes(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        """The result's codes, int64, from the input, a floating tensor on the source's grid."""
        raise NotImplementedError

    def reference(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        """The float operation."""
        raise NotImplementedError

    def forward(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        """The values of the result's codes; gradients are those of the float operation."""
        with torch.no_grad():
            computed = self.result.decode(self.codes(x, *parameters), x.dtype)
        if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters))):
            return computed
        smooth = self.reference(x, *parameters)
        return computed + (smooth - smooth.detach())

"""Activation functions on codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from vitquant.integer.activation import look_up
from vitquant.integer.correct_rounding import CorrectRounding
from vitquant.integer_modules.operation import IntegerOperation, NotIntegerError
from vitquant.quantizers import Quantizer
from vitquant.quantizers.quantizer import channel_axis
from vitquant.quantizers.twin_uniform import TwinUniformQuantizer


@dataclass(frozen=True)
class Elementwise:
    """A function of one tensor, held by the name of its torch operator, since operators cannot be pickled.

    Arguments:
        operator: such as `aten.gelu.default`.
        rest, keywords: the arguments after the tensor.
    """

    operator: str
    rest: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def __call__(self, x: Tensor) -> Tensor:
        return attrgetter(self.operator)(torch.ops)(x, *self.rest, **self.keywords)


class TableActivation(IntegerOperation):
    """Any elementwise function, by a table with an entry for each code of its input.

    Arguments:
        source, result: see `IntegerOperation`.
        function: the float operation.
    """

    kind = "activation"
    description = "table with an entry for each code"
    entries: Tensor

    def __init__(self, source: Quantizer, result: Quantizer, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(source, result)
        self._function = function

    def check(self, source: Quantizer, result: Quantizer) -> None:
        if isinstance(source, TwinUniformQuantizer):
            raise NotIntegerError("its input has twin steps, and its table an entry for each of equally spaced ones")
        for quantizer, which in ((source, "input"), (result, "result")):
            if channel_axis(quantizer.spec.granularity) is not None:
                raise NotIntegerError(f"its {which} has more than one scale, and one table serves all elements")

    def reference(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        return self._function(x)

    def derive(self, width: int, *parameters: Tensor | None) -> Mapping[str, Tensor | int]:
        return {"entries": self.table()}

    def _codes(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        return look_up(self.source.encode(x).to(torch.int64), self.entries, self.source.spec.qmin)

    def table(self) -> Tensor:
        """The result's code for each code of the input in ascending order, of the correctly rounded function: int64."""
        spec = self.source.spec
        every = torch.arange(spec.qmin, spec.qmax + 1, device=self.source.scale.device)
        with torch.no_grad(), CorrectRounding():
            values = self._function(self.source.decode(every, torch.float64))
        return self.result.encode(values).to(torch.int64)

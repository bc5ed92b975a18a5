"""The base of operations on codes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitquant.errors import CalibrationError
from vitquant.quantizers import Quantizer


class NotIntegerError(Exception):
    """An operation cannot be computed on codes; the message says why."""


class IntegerOperation(nn.Module):
    """`decode(codes(encode(x)))`: an operation between the quantizer of what it reads and the one of its result.

    What it computes with is derived from the quantizers, and from parameters, and held: integers as attributes,
    tensors as buffers that are not saved, so that they move and travel with the module and are constants of whatever
    it is compiled or exported to. Every call compares what they were derived from with what is there now, so whoever
    changes a scale changes this operation too.

    Arguments:
        source: the quantizer of the input. The input is on its grid, so encoding it loses nothing.
        result: the quantizer that stands behind the operation.

    Attributes:
        kind: of its site.
        description: how it is computed, for the report.
        widest_input, widest_result: the most bits that the codes of either may have.

    Raises:
        NotIntegerError: these quantizers do not allow it.

    Pitfall: what is compiled or exported has the constants of that time. `prepare` before it where scales were changed
        since the last call.
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
        self._sources: tuple[str, ...] = ()  # the buffers that hold what the constants were derived from; none so far
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

    def derive(self, width: int, *parameters: Tensor | None) -> Mapping[str, Tensor | int]:
        """The constants that `_codes` needs, from both quantizers and the parameters, by the attribute of each.

        Arguments:
            width: of the input's last axis.
        """
        return {}

    def prepare(self, width: int, *parameters: Tensor | None) -> None:
        """Derive the constants again where anything is not what they were derived from.

        Arguments:
            width: of the input's last axis.
        """
        scales = [getattr(quantizer, name) for quantizer in self._ends for name in ("scale", "zero_point", "factor")]
        now = [torch.tensor(width), *scales, *parameters]
        if len(now) == len(self._sources) and all(map(_same, now, (getattr(self, name) for name in self._sources))):
            return
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode cannot be compiled
            for name, constant in self.derive(width, *parameters).items():
                self._hold(name, constant)
            for number, tensor in enumerate(now):
                self._hold(f"source{number}", tensor)
        self._sources = tuple(f"source{number}" for number in range(len(now)))

    def _hold(self, name: str, value: Tensor | int | None) -> None:
        if isinstance(value, int):
            setattr(self, name, value)
        else:
            self.register_buffer(name, None if value is None else value.detach().clone(), persistent=False)

    def codes(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        """The result's codes, int64, from the input, a floating tensor on the source's grid.

        Raises:
            CalibrationError: it is being compiled or exported, and was not prepared before.
        """
        if not (torch.compiler.is_compiling() or x.is_meta):
            self.prepare(x.shape[-1], *parameters)
        elif not self._sources:
            raise CalibrationError(f"{self.kind}: its constants depend on what is computed; call the model once before")
        return self._codes(x, *parameters)

    def _codes(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
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


def _same(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return left.dtype == right.dtype and left.device == right.device and torch.equal(left, right)

"""The base class of operations on codes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitquant.errors import CalibrationError
from vitquant.quantizers import Quantizer


class NotIntegerError(Exception):
    """An operation cannot be computed on codes; the message says why."""


class IntegerOperation(nn.Module):
    """`decode(codes(encode(x)))`: an operation on codes between the quantizer of its input and that of its result.

    Its constants are derived from both quantizers and the parameters, and cached: integers as attributes, tensors as
    non-persistent buffers, so that they move with the module and are constants of a compiled or exported model. Every
    call checks whether scales or parameters have changed since, and then derives the constants again.

    Arguments:
        source: the quantizer of the input. The input is on its grid, so that encoding it is exact.
        result: the quantizer of the operation's result.

    Attributes:
        kind: the kind of its site.
        description: how it is computed, for the report.
        widest_input, widest_result: the most bits that the codes of input and result may have.

    Raises:
        NotIntegerError: the operation cannot be computed in integers with these quantizers.

    Pitfall: a compiled or exported model has the constants of the time when it was made. Where scales have changed
        since the last call, call `prepare` before.
    """

    kind: str
    description: str
    widest_input = widest_result = 8

    def __init__(self, source: Quantizer, result: Quantizer) -> None:
        super().__init__()
        self.connect(source, result)

    def connect(self, source: Quantizer, result: Quantizer) -> None:
        """Replace both quantizers.

        Raises:
            NotIntegerError: the operation cannot be computed in integers with these.
        """
        for quantizer, which, most in ((source, "input", self.widest_input), (result, "result", self.widest_result)):
            if quantizer.spec.bits > most:
                raise NotIntegerError(f"its {which} has {quantizer.spec.bits} bits: above {most} is simulated only")
        self.check(source, result)
        self._sources: tuple[str, ...] = ()  # names of the buffers from which the constants were derived
        self._ends = (source, result)  # a tuple, so that they are not registered as submodules

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
            NotIntegerError: there is none; the message says for which quantizer, and why.
        """
        raise NotImplementedError

    def derive(self, width: int, *parameters: Tensor | None) -> Mapping[str, Tensor | int]:
        """The constants that `_codes` needs, from both quantizers and the parameters, by attribute name.

        Arguments:
            width: the size of the input's last axis.
        """
        return {}

    def prepare(self, width: int, *parameters: Tensor | None) -> None:
        """Derive the constants again if scales, parameters or width have changed.

        Arguments:
            width: the size of the input's last axis.
        """
        scales = [getattr(quantizer, name) for quantizer in self._ends for name in ("scale", "zero_point", "factor")]
        now = [torch.tensor(width), *scales, *parameters]
        if len(now) == len(self._sources) and all(map(_same, now, (getattr(self, name) for name in self._sources))):
            return
        with torch.inference_mode(False), torch.no_grad():  # inference tensors cannot be compiled
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
            CalibrationError: the operation is being compiled or exported and was not prepared before.
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

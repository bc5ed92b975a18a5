"""The places of a graph that can be quantized, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = (
    "linear", "conv", "layer_norm", "batch_norm", "softmax", "activation",
    "scores", "context", "product", "residual", "concat", "pool", "output",
)  # fmt: skip
OPERANDS = ("input", "weight", "query", "key", "probs", "value", "lhs", "rhs")


@dataclass(frozen=True)
class Reader:
    """One operand of one site, written `site:operand` (`blocks.0.attn.scores:query`).

    Arguments:
        site: the site's name, the same for every library where the structure is the same.
        module: the path of the module that the operation came from, as the library names it.
        kind: one of `KINDS`.
        operand: one of `OPERANDS`.
    """

    site: str
    module: str
    kind: str
    operand: str

    def __str__(self) -> str:
        return f"{self.site}:{self.operand}"


@dataclass(frozen=True)
class Value:
    """One tensor that quantizable operations read; it has at most one quantizer, whoever reads it.

    Arguments:
        node: the graph node that makes the tensor as its readers see it.
        readers: every operand that reads it, in graph order; the first gives the value its name.
        shape: sizes; -1 stands for a size that grows with the batch.
        channel_axis: the axis that `per = "axis"` means: 0 for a weight, 1 for a convolution's
            input, -1 elsewhere.
        parameter: state-dict key when the tensor is a parameter as stored, else None.
    """

    node: str
    readers: tuple[Reader, ...]
    shape: tuple[int, ...]
    channel_axis: int
    parameter: str | None = None

    @property
    def name(self) -> str:
        """The first reader, as `site:operand`."""
        return str(self.readers[0])

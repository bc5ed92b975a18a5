"""The kinds of operations that can be quantized, and the properties of each kind, one row for each.

A new kind is a row here, what makes a graph node one in `sites`, and, where integers compute it, a definition in
`integer/`, a module in `integer_modules/` and a lowering. CONTRIBUTING.md has the list of files.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class IntegerForm(Enum):
    """How operations of a kind are computed in integers."""

    SUM = "sums of products of codes"  # an accumulator, which is then rescaled
    RESCALING = "codes on another scale"  # a sum of rescaled codes, rounded once
    ON_CODES = "codes to codes"  # computed by a module of `integer_modules`, where the recipe asks for it
    NONE = "none"


@dataclass(frozen=True)
class SiteKind:
    """The properties of one kind.

    Arguments:
        operands: the names of its operands, in the order in which they are reported.
        form: how it is computed in integers.
        summed: operands whose channels are summed over, so that a scale per channel cannot be factored out of the sum.
        widest: the widest codes of its operands, in bits, that integer execution supports.
        rescaled: whether its result is rescaled before it is quantized, so that scales and shifts fuse with it.
        word: the word for its sites in names, such as `norm`; empty where the name comes from the site's place alone.
        norm: whether it is a normalization.
        layer: whether it has a stored weight that is multiplied with its input.
        of_attention: whether it occurs in attention only.
        map: whether its result is one matrix for each head.
        channels_first: whether its channels are axis 1.
    """

    operands: tuple[str, ...] = ("input",)
    form: IntegerForm = IntegerForm.NONE
    summed: tuple[str, ...] = ()
    widest: int = 8
    rescaled: bool = False
    word: str = ""
    norm: bool = False
    layer: bool = False
    of_attention: bool = False
    map: bool = False
    channels_first: bool = False

    @property
    def of_tokens(self) -> bool:
        """Whether it normalizes the channels of tokens."""
        return self.norm and not self.channels_first


_LAYER = ("input", "weight")
_SUM, _RESCALING, _ON_CODES = IntegerForm.SUM, IntegerForm.RESCALING, IntegerForm.ON_CODES

KINDS: dict[str, SiteKind] = {
    "linear": SiteKind(_LAYER, _SUM, summed=("input",), rescaled=True, layer=True),
    "conv": SiteKind(_LAYER, _SUM, summed=("input",), rescaled=True, layer=True, channels_first=True),
    "layer_norm": SiteKind(form=_ON_CODES, widest=16, word="norm", norm=True),
    "rms_norm": SiteKind(form=_ON_CODES, widest=16, word="norm", norm=True),
    "group_norm": SiteKind(word="norm", norm=True, channels_first=True),
    "batch_norm": SiteKind(form=_RESCALING, word="norm", norm=True, channels_first=True),
    "softmax": SiteKind(form=_ON_CODES, word="softmax", map=True),
    "activation": SiteKind(form=_ON_CODES, word="act"),
    "scores": SiteKind(
        ("query", "key"), _SUM, summed=("query", "key"), rescaled=True, word="scores", of_attention=True, map=True
    ),
    "context": SiteKind(
        ("probs", "value"), _SUM, summed=("probs",), rescaled=True, word="context", of_attention=True, map=True
    ),
    "product": SiteKind(("lhs", "rhs"), _SUM, summed=("lhs",), rescaled=True, map=True),
    "gate": SiteKind(("lhs", "rhs"), _SUM, rescaled=True),
    "residual": SiteKind(("lhs", "rhs"), _RESCALING, widest=16, rescaled=True, word="residual"),
    "concat": SiteKind(form=_RESCALING, widest=16, word="tokens"),
    "pool": SiteKind(form=_RESCALING, widest=16, rescaled=True, word="pool"),
    "output": SiteKind(form=_RESCALING, word="output"),
}
OPERANDS = tuple(dict.fromkeys(operand for kind in KINDS.values() for operand in kind.operands))


def kinds_that(**what: bool) -> tuple[str, ...]:
    """The names of the kinds with these properties, such as `norm=True`."""
    return tuple(
        name for name, kind in KINDS.items() if all(getattr(kind, key) is value for key, value in what.items())
    )

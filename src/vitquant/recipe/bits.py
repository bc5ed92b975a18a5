"""Bit widths of a whole recipe, written `w8a8s4r8`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from vitquant.errors import RecipeError
from vitquant.spec import MAX_BITS, MIN_BITS

BIT_SYMBOLS = ("w", "a", "s", "r", "input")
_FORM = re.compile(r"w([0-9]+)a([0-9]+)(?:s([0-9]+))?(?:r([0-9]+))?")
_EXPECTED = f'bits are written w<b>a<b>[s<b>][r<b>] with b from {MIN_BITS} to {MAX_BITS}, as in "w8a8" or "w4a8s4"'


@dataclass(frozen=True)
class Bits:
    """Bits of weights, activations, attention probabilities and the residual stream.

    Arguments:
        weights: symbol `w`.
        activations: symbol `a`.
        probs: symbol `s`, the attention probabilities.
        residual: symbol `r`, the residual stream and the inputs of normalizations.
        input: symbol `input`, the network's input; always 8, since images come in 8 bits.

    Raises:
        RecipeError: a width is outside 2 to 16.
    """

    weights: int = 8
    activations: int = 8
    probs: int = 8
    residual: int = 8
    input: int = field(default=8, init=False)

    def __post_init__(self) -> None:
        for bits in (self.weights, self.activations, self.probs, self.residual):
            if not MIN_BITS <= bits <= MAX_BITS:
                raise RecipeError(f"{bits} bits: {_EXPECTED}")

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Read `w<b>a<b>[s<b>][r<b>]`; without `s`, probabilities follow `a`; without `r`, the residual has 8.

        Arguments:
            text: upper or lower case (papers write W4A8).

        Raises:
            RecipeError: the text has another form, or a width is outside 2 to 16.
        """
        match = _FORM.fullmatch(text.strip().lower())
        if match is None:
            raise RecipeError(f"{text!r} is no bit width: {_EXPECTED}")
        weights, activations, probs, residual = match.groups()
        try:
            return cls(int(weights), int(activations), int(probs or activations), int(residual or 8))
        except RecipeError as error:
            raise RecipeError(f"{text!r}: {error}") from None

    def __str__(self) -> str:
        """The shortest text that `parse` reads back as the same bits."""
        probs = "" if self.probs == self.activations else f"s{self.probs}"
        residual = "" if self.residual == 8 else f"r{self.residual}"
        return f"w{self.weights}a{self.activations}{probs}{residual}"

    def of(self, symbol: str | int) -> int:
        """The width in bits for a rule's `bits`: a number as it is, or the width of one of `BIT_SYMBOLS`.

        Raises:
            RecipeError: an unknown symbol.
        """
        if isinstance(symbol, int):
            return symbol
        widths = (self.weights, self.activations, self.probs, self.residual, self.input)
        try:
            return widths[BIT_SYMBOLS.index(symbol)]
        except ValueError:
            raise RecipeError(f"bits = {symbol!r}: it is a number or one of {', '.join(BIT_SYMBOLS)}") from None

"""The choice of how softmax, norms and activations are computed."""

from __future__ import annotations

from dataclasses import dataclass

from vitquant.errors import RecipeError

CHOICES: dict[str, tuple[str, ...]] = {
    "exponential": ("exact", "polynomial"),
    "softmax": ("integer", "published", "float"),
    "layer_norm": ("integer", "published", "float"),
    "rms_norm": ("integer", "float"),
    "activation": ("table", "float"),
}


@dataclass(frozen=True)
class Arithmetic:
    """How each kind of operation is computed if its operands are quantized.

    Arguments:
        exponential: the function in the softmax's table: `exact`, or the `polynomial` of I-BERT that FQ-ViT uses.
        softmax: `integer`; `published`, FQ-ViT's log-int-softmax with its rounding, where a softmax with results on
            equally spaced levels stays in float; or `float`.
        layer_norm: `integer`; `published`, FQ-ViT's with float statistics, where a LayerNorm of inputs without
            power-of-two factors stays in float; or `float`.
        rms_norm: `integer`, LayerNorm's arithmetic without the mean; or `float`.
        activation: `table`, one entry for each code; or `float`.

    Raises:
        RecipeError: a choice is unknown.
    """

    exponential: str = "exact"
    softmax: str = "integer"
    layer_norm: str = "integer"
    rms_norm: str = "integer"
    activation: str = "table"

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            value = getattr(self, key)
            if value not in choices:
                raise RecipeError(f"{key} = {value!r}: it is one of {', '.join(choices)}")

    @property
    def in_integers(self) -> bool:
        """Whether every kind is computed in integers, unlike the published LayerNorm with its float statistics."""
        return self.layer_norm == "integer" and "float" not in (self.softmax, self.rms_norm, self.activation)

"""Softmax, LayerNorm and activations on codes instead of in float."""

from __future__ import annotations

from vitquant.integer_modules import Arithmetic
from vitquant.methods.context import Context
from vitquant.model import QuantizedModel, Record


def integer_operations(model: QuantizedModel, context: Context, settings: Arithmetic) -> Record:
    """Compute every softmax, LayerNorm and activation on codes, where its quantizers allow it.

    Arguments:
        model: with its quantizers.
        context: not used.
        settings: how each kind is computed.
    """
    model.compute_in_integers(settings)
    computed = {name: {"computed by": type(op).__name__} for name, op in model.integer_operations.items()}
    refused = {name: {"in float, because": reason} for name, reason in model.float_reasons.items()}
    return Record("integer-operations", {"integer": len(computed), "float": len(refused)}, {**computed, **refused})

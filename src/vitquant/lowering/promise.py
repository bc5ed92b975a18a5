"""A recipe's promise that its models lower to integers, and the checks of whether a model keeps it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.fx import GraphModule

from vitquant.errors import LoweringError
from vitquant.graph.captured import CapturedModel
from vitquant.graph.sites import Value
from vitquant.integer_modules import Arithmetic
from vitquant.lowering.context import SIMULATE
from vitquant.lowering.lower import lower, translate
from vitquant.model import QuantizedModel
from vitquant.quantizers import Quantizer, build_quantizer, params_from_range
from vitquant.quantizers.quantizer import channel_axis
from vitquant.recipe import Bits, Recipe
from vitquant.spec import Logarithmic, QuantSpec

# Bit widths that integers support, the widest first: of operands of products and tables, and of probabilities.
_CODES, _PROBS = (8,), (8, 5, 4)
_RANGE = 8.0  # a stand-in for every calibrated range; no refusal of `translate` depends on it


def promised(recipe: Recipe) -> Arithmetic | None:
    """The arithmetic with which a recipe promises to compute in integers; None when it makes no such promise.

    A recipe promises it by its method `integer-operations`, unless that leaves softmax, norms or activations in
    float, or computes LayerNorm as published, with float statistics.

    Raises:
        RecipeError: a setting of the method is invalid.
    """
    settings = next((method.settings for method in recipe.methods if method.name == "integer-operations"), None)
    if settings is None:
        return None
    arithmetic = Arithmetic(**settings)
    return arithmetic if arithmetic.in_integers else None


def check_possible(captured: CapturedModel, recipe: Recipe, bits: Bits) -> None:
    """Refuse, before calibration, a recipe that promises integers but whose bits or schemes, or the model, prevent it.

    The model is lowered with placeholder ranges instead of calibrated ones. `check_promise` finds the failures that
    depend on the ranges.

    Arguments:
        captured: the float model without quantizers; not changed.
        recipe, bits: as for `QuantizedModel`.

    Raises:
        LoweringError: the recipe promises integers, and the model cannot be lowered; the message names the site, the
            reason and what to do, which is another choice of bits where one helps.
        RecipeError: the recipe does not fit the model.
    """
    arithmetic = promised(recipe)
    if arithmetic is None:
        return

    def refusal(widths: Bits) -> LoweringError | None:
        try:
            translate(_rehearsed(captured, recipe, widths, arithmetic))
        except LoweringError as error:
            return error
        return None

    if (error := refusal(bits)) is not None:
        helping = _widest(bits, lambda widths: refusal(widths) is None)
        raise _broken(recipe, error, "" if helping is None else f"give --bits {helping}")


def check_promise(model: QuantizedModel) -> None:
    """Refuse a calibrated model that cannot be lowered although its recipe promises integers.

    Raises:
        LoweringError: it cannot be lowered; the message names the site, the reason and what to do.
    """
    if promised(model.recipe) is None:
        return
    try:
        lower(model)
    except LoweringError as error:
        raise _broken(model.recipe, error) from None


def _broken(recipe: Recipe, error: LoweringError, remedy: str = "") -> LoweringError:
    remedy = remedy or error.remedy.replace(SIMULATE, "")
    simulate = "give --simulated (simulated=True) if a simulation in float will do"
    problem = f"{error.problem}, and {recipe.name} promises integers"
    return LoweringError(problem, f"{remedy}, or {simulate}" if remedy else simulate)


def _rehearsed(captured: CapturedModel, recipe: Recipe, bits: Bits, arithmetic: Arithmetic) -> QuantizedModel:
    """A model with the same weights, with quantizers of the same bits as the real ones and placeholder ranges."""
    module = captured.graph_module
    graph = GraphModule(module, copy.deepcopy(module.graph))
    model = QuantizedModel(CapturedModel(graph, captured.input_shape, captured.index), recipe, bits)
    specs = ((value, model.assignments[value.name].spec) for value in model.values)
    device = next(captured.parameters()).device
    model.insert({value.name: _stand_in(value, spec).to(device) for value, spec in specs if spec is not None})
    model.compute_in_integers(arithmetic)
    return model


def _stand_in(value: Value, spec: QuantSpec) -> Quantizer:
    axis = channel_axis(spec.granularity)
    largest = 1.0 if isinstance(spec.scheme, Logarithmic) else _RANGE  # the published softmax requires scale 1
    high = torch.full(() if axis is None else (value.shape[axis],), largest, dtype=torch.float64)
    return build_quantizer(spec, params_from_range(-high, high, spec))


def _widest(bits: Bits, lowers: Callable[[Bits], bool]) -> Bits | None:
    """The widest bits, at most those asked for, with which the model lowers; None where there are none."""
    found = replace(
        bits,
        weights=min(bits.weights, _CODES[-1]),
        activations=min(bits.activations, _CODES[-1]),
        probs=min(bits.probs, _PROBS[-1]),
        residual=min(bits.residual, _CODES[-1]),
    )
    if found == bits or not lowers(found):
        return None
    for symbol, widths in (("residual", _CODES), ("weights", _CODES), ("activations", _CODES), ("probs", _PROBS)):
        asked = getattr(bits, symbol)
        for width in (asked, *(width for width in widths if width < asked)):
            wider = replace(found, **{symbol: width})
            if wider == found:
                break
            if wider != bits and lowers(wider):
                found = wider
                break
    return found

"""All methods that a recipe may name, and the order in which those of a recipe run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

from vitquant.errors import CalibrationError, RecipeError, VitquantError
from vitquant.integer_modules import Arithmetic
from vitquant.methods.adversarial_distillation import (
    DistillAdversariallySettings,
    check_attention,
    distill_adversarially,
)
from vitquant.methods.calibrate import CalibrateSettings, calibrate
from vitquant.methods.context import Context
from vitquant.methods.contract import Definition, Needs, Phase
from vitquant.methods.integer_operations import integer_operations
from vitquant.methods.output_reconstruction import ReconstructOutputSettings, reconstruct_output
from vitquant.methods.power_of_two_factor import ChooseFactorsSettings, choose_factors, has_no_factors
from vitquant.methods.scale_evolution import EvolveScalesSettings, check_evolution, evolve_scales
from vitquant.methods.scale_reparameterization import ReparameterizeScalesSettings, check_sites, reparameterize_scales
from vitquant.methods.scale_search import SearchScalesSettings, search_scales
from vitquant.methods.weight_correction import CorrectWeightsSettings, correct_weights
from vitquant.model import QuantizedModel, Record
from vitquant.recipe import Method, Recipe
from vitquant.schema import Table, check, of_type

_CALIBRATED = ("calibrate",)

METHODS: dict[str, Definition[Any]] = {
    "calibrate": Definition(calibrate, CalibrateSettings, Phase.CALIBRATE, Needs(passes=1)),
    "reparameterize-scales": Definition(
        reparameterize_scales,
        ReparameterizeScalesSettings,
        Phase.CALIBRATE,
        Needs(passes=1),
        _CALIBRATED,
        check_sites,
    ),
    "search-scales": Definition(
        search_scales, SearchScalesSettings, Phase.SEARCH, Needs(passes=2, memory=True), _CALIBRATED
    ),
    "choose-factors": Definition(
        choose_factors, ChooseFactorsSettings, Phase.SEARCH, Needs(passes=1), _CALIBRATED, idle=has_no_factors
    ),
    "correct-weights": Definition(correct_weights, CorrectWeightsSettings, Phase.SEARCH, Needs(passes=1), _CALIBRATED),
    "evolve-scales": Definition(
        evolve_scales,
        EvolveScalesSettings,
        Phase.SEARCH,
        Needs(passes=2, teacher=True, memory=True, workers=True),
        _CALIBRATED,
        check_evolution,
    ),
    "reconstruct-output": Definition(
        reconstruct_output,
        ReconstructOutputSettings,
        Phase.RECONSTRUCT,
        Needs(passes=2, gradients=True, teacher=True),
        _CALIBRATED,
    ),
    "distill-adversarially": Definition(
        distill_adversarially,
        DistillAdversariallySettings,
        Phase.RECONSTRUCT,
        Needs(passes=1, gradients=True, teacher=True, memory=True),
        _CALIBRATED,
        check_attention,
    ),
    "integer-operations": Definition(integer_operations, Arithmetic, Phase.INTEGERS, after=_CALIBRATED),
}


@dataclass(frozen=True)
class Step:
    """A method of a recipe with its settings, ready to run."""

    name: str
    definition: Definition[Any]
    settings: Any

    def check(self, model: QuantizedModel) -> None:
        """Refuse a model or settings that do not fit the method, before any image is read.

        Raises:
            VitquantError: raised by the method.
        """
        if self.definition.check is not None:
            self._named(lambda check: check(model, self.settings), self.definition.check)

    def run(self, model: QuantizedModel, context: Context) -> Record:
        """Run the method on a model.

        Raises:
            VitquantError: raised by the method; the message names the method, and the site where there is one.
        """
        return self._named(lambda run: run(model, context, self.settings), self.definition.run)

    def _named(self, call: Any, function: Any) -> Any:
        try:
            return call(function)
        except CalibrationError as error:
            where = f"{self.name} at {error.site}" if error.site else self.name
            raise CalibrationError(f"{where}: {error.problem}") from error
        except VitquantError as error:
            raise type(error)(f"{self.name}: {error}") from error


def planned(recipe: Recipe) -> tuple[Step, ...]:
    """The methods of a recipe in the order of their phases; those of one phase in the order of `METHODS`.

    Raises:
        RecipeError: a method or one of its settings is unknown, or a method that another builds on is missing.
    """
    names = [method.name for method in recipe.methods]
    for name in names:
        if name not in METHODS:
            near = get_close_matches(name, METHODS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the methods are: {', '.join(METHODS)}"
            raise RecipeError(f"method {name!r} is unknown; {hint}")
        for other in METHODS[name].after:
            if other not in names:
                raise RecipeError(f"{recipe.name}: {name} works on what {other} gives, which the recipe lacks")
    order = list(METHODS)
    steps = [_step(method) for method in recipe.methods]
    return tuple(sorted(steps, key=lambda step: (step.definition.phase, order.index(step.name))))


def passes(steps: Sequence[Step], model: QuantizedModel) -> int:
    """How many times steps iterate over the calibration images of a model, at least."""
    return sum(step.definition.needs.passes for step in steps if not step.definition.idle(model))


def _step(method: Method) -> Step:
    definition = METHODS[method.name]
    hints = {name: of_type(hint) for name, hint in get_type_hints(definition.settings).items()}
    check(method.settings, Table({}, hints), RecipeError, method.name)
    return Step(method.name, definition, definition.settings(**method.settings))

"""A table of the measured sensitivities of a model, its file, and the allocation of bits from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vitquant.allocation.front import Allocation, Choice, Costs, best_within, pareto_front
from vitquant.allocation.measure import SENSITIVITY, Sensitivity
from vitquant.allocation.mixed_recipe import mixed_recipe
from vitquant.errors import AllocationError, VitquantError
from vitquant.parsing import parse_json, read_file
from vitquant.recipe import Bits, Recipe
from vitquant.schema import Integer, ListOf, Plain, Table, TableOf, Text, check
from vitquant.spec import MAX_BITS, MIN_BITS

FORMAT = 1
_LONGEST = 2**25  # bytes of a file; that of a large model with many candidates has 2**21
_BITS = Integer(MIN_BITS, MAX_BITS)
_SIZE = Integer(0, 2**50)
_SIZES = Table({}, {str(bits): _SIZE for bits in range(MIN_BITS, MAX_BITS + 1)})
_SCHEMA = Table(
    {
        "format": Integer(FORMAT, FORMAT),
        "about": TableOf(Plain()),
        "bits": Text(100),
        "recipe": TableOf(Plain()),
        "other_bytes": _SIZE,
        "numbers": TableOf(Integer(1, 2**50), least=1),
        "bytes": TableOf(_SIZES, least=1),
        "values": TableOf(TableOf(ListOf(Text(pattern=r".*:.*")))),
        "modules": ListOf(SENSITIVITY, least=1),
        "sites": ListOf(SENSITIVITY),
    }
)
MEASURES = ("nuclear-norm", "output-error", "correlation")


@dataclass(frozen=True)
class SensitivityTable:
    """The sensitivities of a model's modules and sites under a recipe.

    Arguments:
        recipe: the complete recipe.
        bits: the widths for its symbols outside of modules.
        modules: one sensitivity for each module and candidate, in order of the candidates.
        sites: one sensitivity for each site, at `bits`.
        numbers: the number of elements of each module's weights.
        bytes: the bytes of each module's weights in a saved model, at each candidate.
        values: for each module the names of its values, by the name of the rule that decides about them.
        other_bytes: the bytes of everything else in a saved model.
        about: facts about the model and the calibration images, plain JSON values.
    """

    recipe: Recipe
    bits: str
    modules: tuple[Sensitivity, ...]
    sites: tuple[Sensitivity, ...]
    numbers: Mapping[str, int]
    bytes: Mapping[str, Mapping[int, int]]
    values: Mapping[str, Mapping[str, tuple[str, ...]]]
    other_bytes: int
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def candidates(self) -> list[int]:
        """The bit widths at which modules were measured, in ascending order."""
        return sorted({int(each.bits) for each in self.modules})

    def mean_bits(self) -> Costs:
        """The costs as bits of the modules' weights; the unit is the mean bits per weight."""
        of = {name: {bits: bits * count for bits in self.candidates} for name, count in self.numbers.items()}
        return Costs(of, "bits in the mean", per=sum(self.numbers.values()))

    def megabytes(self) -> Costs:
        """The costs as the size of the saved model, with everything else in it; codes above 8 bits take 16."""
        return Costs(self.bytes, "MB", self.other_bytes, 1e6)

    def choices(self, by: str, costs: Costs) -> dict[str, list[Choice]]:
        """The candidates of each module, with their sensitivity by a measure and their cost.

        Arguments:
            by: one of `MEASURES`; for correlation the sensitivity is 1 - correlation.
            costs: of each module at each candidate: `mean_bits()`, `megabytes()`, or measured times.

        Raises:
            AllocationError: the measure is unknown, or the costs lack a module or a candidate.
        """
        if by not in MEASURES:
            raise AllocationError(f"measure {by!r} is unknown; the measures are: {', '.join(MEASURES)}")
        found: dict[str, list[Choice]] = {}
        for each in self.modules:
            lost = {
                "nuclear-norm": each.nuclear_sensitivity,
                "output-error": each.output_error,
                "correlation": 1 - each.correlation,
            }[by]
            bits = int(each.bits)
            if bits not in costs.of.get(each.name, {}):
                raise AllocationError(f"costs say nothing of {each.name} at {bits} bits")
            found.setdefault(each.name, []).append(Choice(bits, costs.of[each.name][bits], lost))
        return found

    def uniform(self, by: str, costs: Costs) -> dict[int, tuple[float, float]]:
        """For each bit width the cost and the sensitivity of the model if all modules have it.

        Arguments:
            by, costs: see `choices`.
        """
        found: dict[int, tuple[float, float]] = {}
        for choice in (choice for part in self.choices(by, costs).values() for choice in part):
            cost, lost = found.get(choice.bits, (0.0, 0.0))
            found[choice.bits] = (cost + choice.cost, lost + choice.sensitivity)
        return found

    def allocate(
        self,
        *,
        mean_bits: float | None = None,
        megabytes: float | None = None,
        within: tuple[float, Costs] | None = None,
        by: str = "nuclear-norm",
    ) -> tuple[Recipe, Allocation]:
        """The recipe with the allocation of least sensitivity within a budget; exactly one budget is given.

        Arguments:
            mean_bits: the maximum of the mean bits of the modules' weights.
            megabytes: the maximum of the saved model's size.
            within: any other maximum, with the costs that it applies to.
            by: see `choices`.

        Raises:
            AllocationError: not exactly one budget is given, or it is out of range; the message gives the range.
        """
        targets = [
            *([] if mean_bits is None else [(mean_bits, self.mean_bits())]),
            *([] if megabytes is None else [(megabytes, self.megabytes())]),
            *([] if within is None else [within]),
        ]
        if len(targets) != 1:
            raise AllocationError("give one target: mean bits, or megabytes")
        ((budget, costs),) = targets
        choices = self.choices(by, costs)
        allocation = best_within(pareto_front(choices), choices, costs, budget)
        return self.with_bits(allocation.bits, by), allocation

    def with_bits(self, bits: Mapping[str, int], by: str) -> Recipe:
        """The recipe with bits for each module.

        Arguments:
            bits: of each module.
            by: the measure by which they were chosen, for the recipe's title.
        """
        costs = self.mean_bits()
        mean = costs.total(sum(costs.of[name][width] for name, width in bits.items()))
        recipe = mixed_recipe(self.recipe, self.values, bits)
        title = f"{recipe.title}; mixed precision by {by}, {mean:.2f} bits in the mean of {len(bits)} modules"
        return replace(recipe, name=f"{recipe.name}-mixed", title=title, bits=Bits.parse(self.bits), expected="")

    def to_json(self) -> str:
        """The text that `from_json` reads back."""
        return json.dumps(
            {
                "format": FORMAT,
                "about": dict(self.about),
                "bits": self.bits,
                "recipe": self.recipe.to_dict(),
                "other_bytes": self.other_bytes,
                "numbers": dict(self.numbers),
                "bytes": {
                    name: {str(bits): size for bits, size in sizes.items()} for name, sizes in self.bytes.items()
                },
                "values": {
                    name: {rule: list(names) for rule, names in decided.items()}
                    for name, decided in self.values.items()
                },
                "modules": [each.to_dict() for each in self.modules],
                "sites": [each.to_dict() for each in self.sites],
            },
            indent=1,
            allow_nan=False,
        )

    @classmethod
    def from_json(cls, path: Path) -> SensitivityTable:
        """Read a file with the text that `to_json` returned.

        Raises:
            AllocationError: the file cannot be read, is not such a file, or has another format.
        """
        try:
            table = parse_json(read_file(path, _LONGEST, AllocationError), AllocationError, edited=True)
            if isinstance(table, dict) and table.get("format", FORMAT) != FORMAT:
                raise AllocationError(f"it has format {table['format']}, and this vitquant reads format {FORMAT}")
            check(table, _SCHEMA, AllocationError)
            made = cls(
                Recipe.from_dict(table["recipe"]),
                str(Bits.parse(table["bits"])),
                tuple(Sensitivity(**each) for each in table["modules"]),
                tuple(Sensitivity(**each) for each in table["sites"]),
                table["numbers"],
                {name: {int(bits): size for bits, size in of.items()} for name, of in table["bytes"].items()},
                {name: {r: tuple(v) for r, v in decided.items()} for name, decided in table["values"].items()},
                table["other_bytes"],
                table["about"],
            )
            made._check()
        except VitquantError as error:
            raise AllocationError(f"{path}: {error}") from error
        return made

    def _check(self) -> None:
        """Refuse inconsistencies that editing a file can cause."""
        for each in self.modules:
            check(int(each.bits) if each.bits.isascii() and each.bits.isdigit() else each.bits, _BITS, AllocationError)
        measured = [(each.name, int(each.bits)) for each in self.modules]
        expected = [(name, bits) for bits in self.candidates for name in self.numbers]
        quantizing = {rule.name for rule in self.recipe.rules if rule.spec is not None}
        sound = (
            sorted(measured) == sorted(expected)
            and set(self.values) == set(self.bytes) == set(self.numbers)
            and all(sorted(of) == self.candidates for of in self.bytes.values())
            and all(set(decided) <= quantizing for decided in self.values.values())
        )
        if not sound:
            raise AllocationError("its modules, numbers, bytes and values do not agree; measure the model again")

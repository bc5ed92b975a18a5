"""Everything that was measured about a model's sensitivity, as a file, and what can be decided from it."""

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
_LONGEST = 2**25  # bytes of a file; a large model's with many candidates has 2**21
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
    """How sensitive a model's modules and sites are under a recipe.

    Arguments:
        recipe: the recipe, whole.
        bits: what its symbols stand for where no module has bits of its own.
        modules: one for each module and candidate, candidates in order.
        sites: one for each site, at `bits`.
        numbers: how many numbers each module's weights have.
        bytes: what each module's weights take in a saved model, at each candidate.
        values: for each module the rules that decide about it, and the names of what they decide about there.
        other_bytes: what is stored beside the modules' weights.
        about: model, calibration images: plain JSON values.
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
        """The bit widths that modules were measured at."""
        return sorted({int(each.bits) for each in self.modules})

    def mean_bits(self) -> Costs:
        """The bits of all modules' weights; the unit is bits in the mean."""
        of = {name: {bits: bits * count for bits in self.candidates} for name, count in self.numbers.items()}
        return Costs(of, "bits in the mean", per=sum(self.numbers.values()))

    def megabytes(self) -> Costs:
        """What a saved model takes, patch embedding, head and all that is float with it. Above 8 bits that is 16."""
        return Costs(self.bytes, "MB", self.other_bytes, 1e6)

    def choices(self, by: str, costs: Costs) -> dict[str, list[Choice]]:
        """For each module its candidates, with what `by` measured and what they cost.

        Arguments:
            by: one of `MEASURES`; of correlations, what is missing to 1.
            costs: of each module at each candidate: `mean_bits()`, `megabytes()`, or measured times.

        Raises:
            AllocationError: an unknown measure, or costs that lack a module or a candidate.
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
        """What the same bits in all modules cost, and how sensitive the model is to them.

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
        """The recipe that gives every module the bits with which the model loses least; one target is given.

        Arguments:
            mean_bits: of the modules' weights, at most.
            megabytes: of the saved model, at most.
            within: any other budget, at most, and the costs that it is for.
            by: see `choices`.

        Raises:
            AllocationError: not one of the targets, or one that no candidates meet; it says the range.
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
            by: what chose them, for the recipe's title.
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
        """Read a file that `to_json` filled.

        Raises:
            AllocationError: it cannot be read, is no such file, or of a newer format.
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
        """Refuse what an edit can make of a file."""
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

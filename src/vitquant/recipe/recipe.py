"""A recipe: rules that assign specs to operands, and methods with their settings; reading and writing TOML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vitquant.errors import RecipeError
from vitquant.parsing import parse_toml
from vitquant.recipe.bits import Bits
from vitquant.recipe.rule import Rule
from vitquant.recipe.tables import within
from vitquant.schema import LINES, Flag, Integer, ListOf, Plain, Table, TableOf, Text, check, take

FORMAT = 1
LONGEST = 2**22  # bytes of a file; a recipe that names every value of a large model has 2**18
_NAME = re.compile(r"[A-Za-z0-9_-]+")

# Rules and methods are checked by schemas of their own, whose errors name the rule or method.
_TABLES = ListOf(TableOf(Plain()), most=10_000)
_PROSE = Text(10_000, LINES)
_COUNT = Integer(1, 2**31)
_CALIBRATION = Table({}, {"images": _COUNT, "batch": _COUNT})
_FORMAT_KEY = Integer(-(2**31), 2**31)
_BOTH = {"format": _FORMAT_KEY, "name": Text(1000), "title": _PROSE}
_RECIPE = Table(
    _BOTH,
    {
        **dict.fromkeys(("source", "expected", "cost"), _PROSE),
        "bits": Text(100),
        "relative_cost": _COUNT,
        "calibration": _CALIBRATION,
        "rule": _TABLES,
        "method": _TABLES,
    },
)
_OVERLAY = Table(_BOTH, {"overlay": Flag(), "rule": _TABLES, "method": _TABLES})


@dataclass(frozen=True)
class Method:
    """One method that a recipe names, with its settings.

    Arguments:
        name: such as `calibrate`.
        settings: TOML values, which the method itself checks.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The table that `from_dict` reads back as the same method."""
        return {"name": self.name, **self.settings}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Method:
        """Read one `[[method]]`: `name`, and every other key is a setting.

        Raises:
            RecipeError: it has no name.
        """
        with within("a method"):
            check(table, TableOf(Plain()), RecipeError)
            name = take(table, "name", Text(100), RecipeError)
        return cls(name, {key: value for key, value in table.items() if key != "name"})


@dataclass(frozen=True)
class Calibration:
    """The number of calibration images, and of images in a batch."""

    images: int = 1000
    batch: int = 100

    def __post_init__(self) -> None:
        if self.images < 1 or self.batch < 1:
            raise RecipeError(f"calibration: images = {self.images}, batch = {self.batch}: both are at least 1")

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Calibration:
        """Read the `calibration` table.

        Raises:
            RecipeError: an unknown key, or a number below 1.
        """
        return cls(**check(table, _CALIBRATION, RecipeError, "calibration"))


@dataclass(frozen=True)
class Recipe:
    """How to quantize a model, as published; the last rule that matches an operand wins.

    Arguments:
        name, title, source: its name, a short description, and the paper.
        rules: from general to special.
        methods: run in the order of their phases, see `methods.table.planned`.
        bits: the widths for the symbols in the rules when the user gives no bits.
        calibration: how many calibration images, and in which batches.
        expected, cost: the expected accuracy, and the computation that it takes, as text.
        relative_cost: the computation in units of a float pass over the calibration images; a pass with gradients
            counts as three, and a search as the number of passes that take as long.

    Raises:
        RecipeError: the relative cost is below 1; a text has control characters; the name of a rule or method is
            taken, or cannot be written in `--set name.key`.
    """

    name: str
    title: str
    rules: tuple[Rule, ...] = ()
    methods: tuple[Method, ...] = ()
    source: str = ""
    bits: Bits = field(default_factory=Bits)
    calibration: Calibration = field(default_factory=Calibration)
    expected: str = ""
    cost: str = ""
    relative_cost: int = 1

    def __post_init__(self) -> None:
        if self.relative_cost < 1:
            raise RecipeError(f"relative_cost = {self.relative_cost}: a recipe costs one pass over its images at least")
        for key in ("name", "title", "source", "expected", "cost"):
            check(getattr(self, key), _PROSE, RecipeError, key)
        _check_names(self.rules, self.methods)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or TOML, which `from_dict` reads back as the same recipe."""
        texts = {"name": self.name, "title": self.title, "source": self.source}
        texts |= {"expected": self.expected, "cost": self.cost, "bits": str(self.bits)}
        return {
            "format": FORMAT,
            **texts,
            "relative_cost": self.relative_cost,
            "calibration": {"images": self.calibration.images, "batch": self.calibration.batch},
            "rule": [rule.to_dict() for rule in self.rules],
            "method": [method.to_dict() for method in self.methods],
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Recipe:
        """Read what `to_dict` gave, or parsed TOML.

        Raises:
            RecipeError: an unknown key, a value of the wrong type, or a format newer than this version reads.
        """
        _check_format(table)
        if "overlay" in table:
            raise RecipeError('this is an overlay: lay it over a recipe, as in "fq-vit+overlay"')
        check(table, _RECIPE, RecipeError)
        with within("bits"):
            bits = Bits.parse(table.get("bits", str(Bits())))
        return cls(
            rules=tuple(Rule.from_dict(each) for each in table.get("rule", ())),
            methods=tuple(Method.from_dict(each) for each in table.get("method", ())),
            bits=bits,
            calibration=Calibration.from_dict(table.get("calibration", {})),
            **{
                key: table[key]
                for key in ("name", "title", "source", "expected", "cost", "relative_cost")
                if key in table
            },
        )

    def to_toml(self) -> str:
        """The recipe as TOML, without comments; needs the extra `vitquant[recipes]`."""
        try:
            import tomli_w
        except ImportError:
            raise RecipeError("writing TOML needs tomli-w: pip install 'vitquant[recipes]'") from None
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_toml(cls, text: bytes | str, where: str) -> Recipe:
        """Read a recipe.

        Arguments:
            text: TOML.
            where: the file or name that errors mention.

        Raises:
            RecipeError: as `from_dict`, or the text is not valid TOML.
        """
        with within(where):
            return cls.from_dict(parse_toml(text, RecipeError))


@dataclass(frozen=True)
class Overlay:
    """Rules and methods to lay over a recipe.

    Arguments:
        name, title: its name, and a short description.
        rules: they follow the recipe's rules, so that they win.
        methods: the settings of a method that the recipe has too are changed; another method is appended.
    """

    name: str
    title: str
    rules: tuple[Rule, ...] = ()
    methods: tuple[Method, ...] = ()

    @classmethod
    def from_toml(cls, text: bytes | str, where: str) -> Overlay:
        """Read an overlay, a file that says `overlay = true`.

        Raises:
            RecipeError: as `Recipe.from_toml`, or the file is a whole recipe.
        """
        with within(where):
            table = parse_toml(text, RecipeError)
            _check_format(table)
            if table.get("overlay") is not True:
                raise RecipeError("only an overlay can be laid over a recipe; this is none (overlay = true)")
            check(table, _OVERLAY, RecipeError)
            name = table["name"]
            return cls(
                name,
                table["title"],
                tuple(replace(Rule.from_dict(each), overlay=name) for each in table.get("rule", ())),
                tuple(Method.from_dict(each) for each in table.get("method", ())),
            )

    def over(self, recipe: Recipe) -> Recipe:
        """The recipe with this overlay on it, named `recipe+overlay`.

        Raises:
            RecipeError: a rule's name is taken. `matching.assign` refuses rules that set the same operand as
                another overlay's, since this depends on the model.
        """
        methods = {method.name: method for method in recipe.methods}
        for method in self.methods:
            below = methods.get(method.name, method)
            methods[method.name] = Method(method.name, {**below.settings, **method.settings})
        with within(f"{recipe.name}+{self.name}"):
            return replace(
                recipe,
                name=f"{recipe.name}+{self.name}",
                title=f"{recipe.title}; {self.title}",
                rules=recipe.rules + self.rules,
                methods=tuple(methods.values()),
            )


def _check_format(table: Mapping[str, Any]) -> None:
    found = take(table, "format", _FORMAT_KEY, RecipeError)
    if found > FORMAT:
        raise RecipeError(f"format = {found} needs a newer vitquant; this one reads format {FORMAT}")
    if found < FORMAT:
        raise RecipeError(f"format = {found} does not exist; write format = {FORMAT}")


def _check_names(rules: Sequence[Rule], methods: Sequence[Method]) -> None:
    seen = {"calibration": "a table of every recipe"}
    for kind, item in (*(("rule", r) for r in rules), *(("method", m) for m in methods)):
        if not _NAME.fullmatch(item.name):
            raise RecipeError(f"{kind} {item.name!r}: a name has letters, digits, - and _ only")
        if item.name in seen:
            raise RecipeError(f"{kind} {item.name!r}: the name is taken by {seen[item.name]}; names are used once")
        seen[item.name] = f"another {kind}"

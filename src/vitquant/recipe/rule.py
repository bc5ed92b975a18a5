"""One rule of a recipe: which operands it matches, and how it quantizes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from vitquant.errors import RecipeError
from vitquant.graph.kinds import KINDS, OPERANDS
from vitquant.graph.sites import IMAGE, Reader, Value
from vitquant.observers import OBSERVERS
from vitquant.recipe.bits import BIT_SYMBOLS, Bits
from vitquant.recipe.tables import within
from vitquant.schema import Either, Flag, Integer, ListOf, Plain, Table, TableOf, Text, check, nearest, take
from vitquant.spec import (
    MAX_BITS,
    MIN_BITS,
    Granularity,
    Log2,
    LogSqrt2,
    PerAxis,
    PerHead,
    PerTensor,
    PowerOfTwoFactor,
    PowerOfTwoScale,
    QuantSpec,
    Scheme,
    TwinUniform,
    Uniform,
)

SCHEMES: dict[str, type[Scheme]] = {
    "uniform": Uniform,
    "power_of_two_scale": PowerOfTwoScale,
    "power_of_two_factor": PowerOfTwoFactor,
    "twin_uniform": TwinUniform,
    "log2": Log2,
    "log_sqrt2": LogSqrt2,
}
GRANULARITIES = ("tensor", "axis", "head")
SPEC_KEYS = ("scheme", "bits", "signed", "symmetric", "per")
RULE_KEYS = (
    *("name", "site", "kind", "operand", "value", "unless_read_by", "unless_made_by", "float", "spec", "observer"),
    *("optional", "override", "overlay"),
)
_NAMES = ("site", "kind", "operand", "value", "unless_read_by", "unless_made_by")  # one word, or a list of them
_WORDS = Either((Text(), ListOf(Text(), least=1)))
_RULE = Table(
    {"name": Text(100)},
    {
        **dict.fromkeys(_NAMES, _WORDS),
        **dict.fromkeys(("float", "optional", "override"), Flag()),
        "spec": TableOf(Plain()),
        "observer": Text(100),
        "overlay": Text(),
    },
)
_SPEC = {
    "bits": Either((Integer(MIN_BITS, MAX_BITS), Text(among=BIT_SYMBOLS))),
    "signed": Flag(),
    "symmetric": Flag(),
    "per": Text(among=GRANULARITIES),
}


def _spec_table(scheme: str) -> Table:
    """The schema of a rule's `spec` table for a scheme."""
    own = {f.name: Flag() if isinstance(f.default, bool) else Integer(1, 8) for f in fields(SCHEMES[scheme])}
    optional = {**_SPEC, **own}
    return Table({"scheme": Text(), "bits": optional.pop("bits")}, optional)


def scheme_keys(scheme: str) -> tuple[str, ...]:
    """The spec keys that belong to one scheme alone, such as `factors`."""
    return tuple(f.name for f in fields(SCHEMES[scheme])) if scheme in SCHEMES else ()


@dataclass(frozen=True)
class SpecTemplate:
    """A `QuantSpec` in which the recipe's bits and the operand's channel axis are left open.

    Arguments:
        scheme: how the levels are spaced.
        bits: a symbol (`w`, `a`, `s`, `r`, `input`) that the recipe's bits replace, or a number.
        signed, symmetric: as in `QuantSpec`.
        per: which elements share a scale: `tensor`, `axis` (one per channel) or `head`.

    Raises:
        RecipeError: it is not a valid spec, checked at 8 bits for all symbols.
    """

    scheme: Scheme
    bits: str | int
    signed: bool = False
    symmetric: bool = False
    per: str = "tensor"

    def __post_init__(self) -> None:
        if self.per not in GRANULARITIES:
            raise RecipeError(f"per = {self.per!r}; {nearest(self.per, GRANULARITIES)}")
        self.resolve(Bits(), channel_axis=-1)

    def resolve(self, bits: Bits, channel_axis: int) -> QuantSpec:
        """The spec for one operand.

        Arguments:
            bits: the widths for the symbols.
            channel_axis: `Value.channel_axis` of the operand, used when `per` is `axis`.

        Raises:
            RecipeError: these bits do not fit the scheme.
        """
        granularity: Granularity
        match self.per:
            case "axis":
                granularity = PerAxis(channel_axis)
            case "head":
                granularity = PerHead()
            case _:
                granularity = PerTensor()
        return QuantSpec(bits.of(self.bits), self.signed, self.symmetric, granularity, self.scheme)

    def to_dict(self) -> dict[str, Any]:
        """The table that `from_dict` reads back as the same template."""
        name = next(name for name, scheme in SCHEMES.items() if isinstance(self.scheme, scheme))
        rest = {"bits": self.bits, "signed": self.signed, "symmetric": self.symmetric, "per": self.per}
        return {"scheme": name, **rest, **asdict(self.scheme)}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> SpecTemplate:
        """Read the `spec` table of a rule.

        Raises:
            RecipeError: an unknown key or scheme, a value of the wrong type, or an invalid combination of them.
        """
        name = take(table, "scheme", Text(among=tuple(SCHEMES)), RecipeError)
        with within(f"scheme {name!r}"):
            check(table, _spec_table(name), RecipeError)
        own = {key: table[key] for key in scheme_keys(name) if key in table}
        return cls(SCHEMES[name](**own), **{key: table[key] for key in _SPEC if key in table})


@dataclass(frozen=True)
class Rule:
    """Which operands a rule matches, and how they are quantized.

    Arguments:
        name: its name in `--set name.key=value` and in the report.
        site: globs, matched against the site's name and the library's module path.
        kind: the kinds (of `kinds.KINDS`) that match; empty for all.
        operand: the operands (of `kinds.OPERANDS`) that match; empty for all.
        value: the full names of matching values, each by any of its readers as `site:operand`; empty for all.
        unless_read_by: kinds; the rule does not match a value that a site of one of these kinds reads.
        unless_made_by: kinds, or `image`; the rule does not match a value that comes from one of these.
        spec: how to quantize; None leaves the operand in float.
        observer: one of `observers.OBSERVERS`; None if `spec` is None.
        optional: whether it may match nothing.
        override: whether it may set a value that a rule of another overlay sets.
        overlay: the overlay that it comes from, empty for the recipe's own rules.

    Raises:
        RecipeError: an unknown kind, operand or observer, or one of spec and observer without the other.
    """

    name: str
    site: tuple[str, ...] = ("*",)
    kind: tuple[str, ...] = ()
    operand: tuple[str, ...] = ()
    value: tuple[str, ...] = ()
    unless_read_by: tuple[str, ...] = ()
    unless_made_by: tuple[str, ...] = ()
    spec: SpecTemplate | None = None
    observer: str | None = None
    optional: bool = False
    override: bool = False
    overlay: str = ""

    def __post_init__(self) -> None:
        kinds = (("kind", self.kind, tuple(KINDS)), ("unless_read_by", self.unless_read_by, tuple(KINDS)))
        made = ("unless_made_by", self.unless_made_by, (*KINDS, IMAGE))
        given = (*kinds, made, ("operand", self.operand, OPERANDS))
        observer = () if self.observer is None else (self.observer,)
        for key, words, valid in (*given, ("observer", observer, OBSERVERS)):
            for word in words:
                if word not in valid:
                    raise RecipeError(f"rule {self.name!r}: unknown {key} {word!r}; {nearest(word, valid)}")
        if (self.spec is None) != (self.observer is None):
            raise RecipeError(f"rule {self.name!r}: a spec needs an observer, and float takes none")

    def matches(self, value: Value) -> bool:
        """Whether the rule matches a reader of the value that `unless_read_by` and `unless_made_by` do not exclude."""
        left = value.made_by in self.unless_made_by
        left |= any(reader.kind in self.unless_read_by for reader in value.readers)
        return not left and any(self.reads(reader) for reader in value.readers)

    def reads(self, reader: Reader) -> bool:
        """Whether site, kind, operand and name of one reader all match."""
        if self.value and str(reader) not in self.value:
            return False
        in_kind = not self.kind or reader.kind in self.kind
        return in_kind and (not self.operand or reader.operand in self.operand) and self.reads_name(reader)

    def reads_name(self, reader: Reader) -> bool:
        """Whether the site's name or the module's path matches one of the globs."""
        return any(fnmatchcase(reader.site, glob) or fnmatchcase(reader.module, glob) for glob in self.site)

    def to_dict(self) -> dict[str, Any]:
        """The table that `from_dict` reads back as the same rule; defaults are left out."""
        table: dict[str, Any] = {"name": self.name}
        for key in _NAMES:
            words = getattr(self, key)
            if words not in ((), ("*",)):
                table[key] = words[0] if len(words) == 1 else list(words)
        if self.spec is None:
            table["float"] = True
        else:
            table |= {"spec": self.spec.to_dict(), "observer": self.observer}
        flags = {"optional": self.optional, "override": self.override, "overlay": self.overlay}
        return table | {key: value for key, value in flags.items() if value}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Rule:
        """Read one `[[rule]]`; a rule with a spec and no observer uses `minmax`.

        Raises:
            RecipeError: the table is not a valid rule; the message names the rule, and the wrong key or value.
        """
        with within("a rule"):
            name = take(table, "name", Text(100), RecipeError)
        with within(f"rule {name!r}"):
            check(table, _RULE, RecipeError)
            is_float = table.get("float", False)
            if is_float == ("spec" in table):
                raise RecipeError("say either float = true or spec = { scheme = ..., bits = ... }")
            if is_float and "observer" in table:
                raise RecipeError("a float rule observes nothing; remove observer")
            spec = None if is_float else SpecTemplate.from_dict(table["spec"])
            observer = None if is_float else table.get("observer", "minmax")
        words = {key: table[key] for key in _NAMES if key in table}
        return cls(
            name,
            spec=spec,
            observer=observer,
            **{key: (each,) if isinstance(each, str) else tuple(each) for key, each in words.items()},
            **{key: table[key] for key in ("optional", "override", "overlay") if key in table},
        )

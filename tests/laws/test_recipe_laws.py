"""What holds for every recipe: texts read back as what was written, and the last rule that matches wins."""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from vitquant.graph.kinds import KINDS, OPERANDS
from vitquant.graph.sites import Reader, Value
from vitquant.observers import OBSERVERS
from vitquant.recipe.bits import BIT_SYMBOLS, Bits
from vitquant.recipe.matching import assign
from vitquant.recipe.override import override
from vitquant.recipe.recipe import Calibration, Method, Recipe
from vitquant.recipe.rule import GRANULARITIES, Rule, SpecTemplate
from vitquant.spec import Log2, LogSqrt2, PowerOfTwoFactor, PowerOfTwoScale, Uniform

widths = st.integers(2, 16)
all_bits = st.builds(Bits, widths, widths, widths, widths)
names = st.from_regex(r"[a-z][a-z0-9_-]{0,9}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029"), max_size=20)
symbols = st.sampled_from(BIT_SYMBOLS) | st.integers(2, 8)
settings = st.dictionaries(
    names.filter(lambda name: name != "name"),
    st.recursive(
        texts | st.integers(-(2**31), 2**31) | st.booleans() | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
        max_leaves=4,
    ),
    max_size=3,
)
templates = st.one_of(
    st.builds(
        SpecTemplate,
        st.builds(Uniform, st.booleans()) | st.just(PowerOfTwoScale()),
        symbols,
        st.booleans(),
        st.booleans(),
        st.sampled_from(GRANULARITIES),
    ),
    st.builds(SpecTemplate, st.builds(PowerOfTwoFactor, st.integers(1, 8)), symbols, per=st.just("axis")),
    st.builds(
        SpecTemplate,
        st.sampled_from([Log2(), LogSqrt2(), LogSqrt2(True)]),
        symbols,
        symmetric=st.booleans(),
        per=st.sampled_from(GRANULARITIES),
    ),
)


def some(words: tuple[str, ...], at_least: int = 0) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(words), min_size=at_least, max_size=3, unique=True).map(tuple)


@st.composite
def rules(draw: st.DrawFn, name: str, optional: bool | None = None) -> Rule:
    spec = draw(st.none() | templates)
    return Rule(
        name,
        site=draw(some(("*", "blocks.*", "*.fc1", "head"), at_least=1)),
        kind=draw(some(tuple(KINDS))),
        operand=draw(some(OPERANDS)),
        value=draw(some(("head:input", "blocks.0.mlp.fc1:weight"))) if optional is None else (),
        spec=spec,
        observer=None if spec is None else draw(st.sampled_from(OBSERVERS)),
        optional=draw(st.booleans()) if optional is None else optional,
        override=draw(st.booleans()),
    )


@st.composite
def recipes(draw: st.DrawFn, optional: bool | None = None) -> Recipe:
    used = draw(st.lists(names.filter(lambda name: name != "calibration"), unique=True, max_size=6))
    cut = draw(st.integers(0, len(used)))
    return Recipe(
        draw(texts),
        draw(texts),
        rules=tuple(draw(rules(name, optional)) for name in used[:cut]),
        methods=tuple(Method(name, draw(settings)) for name in used[cut:]),
        source=draw(texts),
        bits=draw(all_bits),
        calibration=Calibration(draw(st.integers(1, 9999)), draw(st.integers(1, 512))),
        expected=draw(texts),
        cost=draw(texts),
    )


readers = st.builds(
    Reader,
    site=st.sampled_from(("blocks.0.mlp.fc1", "blocks.1.attn.scores", "head", "norm")),
    module=st.sampled_from(("encoder.layer.0.fc1", "head")),
    kind=st.sampled_from(tuple(KINDS)),
    operand=st.sampled_from(OPERANDS),
)
values = st.lists(
    st.builds(
        Value,
        node=st.just("node"),
        readers=st.lists(readers, min_size=1, max_size=3).map(tuple),
        shape=st.just((-1, 4)),
        channel_axis=st.sampled_from((-1, 0, 1)),
    ),
    unique_by=lambda value: value.name,
    max_size=5,
)


@given(all_bits)
def test_bits_are_read_as_written(bits: Bits) -> None:
    assert Bits.parse(str(bits)) == bits


@given(recipes())
def test_recipe_is_read_as_written_in_toml(recipe: Recipe) -> None:
    assert Recipe.from_toml(recipe.to_toml(), "law") == recipe


@given(recipes())
def test_recipe_is_read_as_written_in_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@given(rules("rule").filter(lambda rule: rule.spec is not None), st.sampled_from(OBSERVERS), st.integers(2, 8))
def test_override_changes_what_it_names_and_nothing_else(rule: Rule, observer: str, bits: int) -> None:
    recipe = Recipe("r", "R", rules=(rule, Rule("other")), methods=(Method("calibrate"),))
    set_to = [f"rule.observer={observer}", f"rule.bits={bits}", "calibrate.rounds=3", "calibration.images=7"]
    changed = override(recipe, set_to)
    now = changed.rules[0]
    assert rule.spec is not None
    assert now.spec is not None
    assert (now.observer, now.spec.bits) == (observer, bits)
    assert changed.methods == (Method("calibrate", {"rounds": 3}),)
    assert changed.calibration == Calibration(images=7)
    back = [f"rule.observer={rule.observer}", f"rule.spec.bits={rule.spec.bits}"]
    assert override(changed, back).rules == recipe.rules


def without_heads(recipe: Recipe) -> Recipe:
    """A scale for each head is refused where there are none; that has a test of its own."""
    specs = [
        rule.spec and replace(rule.spec, per="tensor" if rule.spec.per == "head" else rule.spec.per)
        for rule in recipe.rules
    ]
    return replace(
        recipe, rules=tuple(replace(rule, spec=spec) for rule, spec in zip(recipe.rules, specs, strict=True))
    )


@given(recipes(optional=True).map(without_heads), values)
def test_last_rule_that_matches_wins(recipe: Recipe, values: list[Value]) -> None:
    assignments = assign(recipe, Bits(8, 8, 4, 8), values)
    assert list(assignments) == [value.name for value in values]
    for value in values:
        alone = [rule for rule in recipe.rules if rule_alone_matches(rule, value)]
        assert assignments[value.name].rule == (alone[-1].name if alone else "")


def rule_alone_matches(rule: Rule, value: Value) -> bool:
    (assignment,) = assign(Recipe("one", "One", rules=(rule,)), Bits(8, 8, 4, 8), [value]).values()
    return assignment.rule == rule.name

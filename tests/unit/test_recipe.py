"""Recipes by example: what is matched, what is laid over what, and every refusal with its hint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from vitquant.errors import RecipeError
from vitquant.graph.sites import Reader, Value
from vitquant.recipe import library
from vitquant.recipe.bits import Bits
from vitquant.recipe.library import available, load_recipe
from vitquant.recipe.matching import Assignment, assign
from vitquant.recipe.override import override
from vitquant.recipe.recipe import Calibration, Method, Overlay, Recipe
from vitquant.recipe.rule import Rule, SpecTemplate
from vitquant.spec import Log2, PerAxis, PerHead, PerTensor, PowerOfTwoFactor, QuantSpec, Uniform

HEAD = 'format = 1\nname = "mine"\ntitle = "Mine"\n'
WEIGHTS = '[[rule]]\nname = "weights"\noperand = "weight"\nspec = { scheme = "uniform", bits = "w" }\n'
EIGHT_BITS = SpecTemplate(Uniform(), 8)


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """The block raises a RecipeError of one line that holds all the parts."""
    with pytest.raises(RecipeError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def read(body: str) -> Recipe:
    return Recipe.from_toml(HEAD + body, "mine.toml")


def value(*readers: str, axis: int = -1, made_by: str = "") -> Value:
    """A value read by `site:kind:operand` or `site:kind:operand:module`."""
    parts = [reader.split(":") for reader in readers]
    made = tuple(Reader(p[0], p[3] if len(p) > 3 else f"lib.{p[0]}", p[1], p[2]) for p in parts)
    return Value("node", made, (-1, 4), axis, made_by=made_by)


BLOCK = [
    value("patch_embed:conv:input", axis=1),
    value("patch_embed:conv:weight", axis=0),
    value("blocks.0.norm1:layer_norm:input", "blocks.0.residual1:residual:lhs"),
    value("blocks.0.attn.qkv:linear:input"),
    value("blocks.0.attn.qkv:linear:weight", axis=0),
    value("blocks.0.attn.scores:scores:query"),
    value("blocks.0.attn.scores:scores:key"),
    value("blocks.0.attn.softmax:softmax:input"),
    value("blocks.0.attn.context:context:probs"),
    value("blocks.0.attn.context:context:value"),
    value("blocks.0.residual1:residual:rhs"),
    value("blocks.0.mlp.act:activation:input"),
    value("pool:pool:input"),
    value("output:output:input"),
]


class TestBits:
    def test_probabilities_follow_the_activations_and_the_residual_has_eight(self) -> None:
        assert Bits.parse("w4a6") == Bits(weights=4, activations=6, probs=6, residual=8)

    def test_every_part_is_read(self) -> None:
        assert Bits.parse("W3A4s5r6") == Bits(3, 4, 5, 6)

    def test_text_is_canonical(self) -> None:
        assert str(Bits.parse("w8a8s8r8")) == "w8a8"
        assert str(Bits.parse("w8a4s8r6")) == "w8a4s8r6"

    def test_symbols(self) -> None:
        bits = Bits(3, 4, 5, 6)
        assert [bits.of(symbol) for symbol in ("w", "a", "s", "r", "input", 7)] == [3, 4, 5, 6, 8, 7]

    @pytest.mark.parametrize("text", ["", "8", "a8w8", "w8", "w8a8r8s8", "w8a8x", "w-8a8", "w8.0a8"])
    def test_another_form_is_refused(self, text: str) -> None:
        with refused(repr(text), "w<b>a<b>[s<b>][r<b>]"):
            Bits.parse(text)

    @pytest.mark.parametrize("text", ["w1a8", "w8a17", "w8a8s0", "w8a8r32"])
    def test_a_width_out_of_range_is_refused(self, text: str) -> None:
        with refused(repr(text), "from 2 to 16"):
            Bits.parse(text)


class TestTemplate:
    def test_bits_and_axis_are_filled_in(self) -> None:
        template = SpecTemplate(PowerOfTwoFactor(3), "r", per="axis")
        assert template.resolve(Bits(residual=6), 1) == QuantSpec(6, False, False, PerAxis(1), PowerOfTwoFactor(3))

    def test_granularities(self) -> None:
        for per, granularity in (("tensor", PerTensor()), ("axis", PerAxis(0)), ("head", PerHead())):
            assert SpecTemplate(Uniform(), 8, per=per).resolve(Bits(), 0).granularity == granularity


class TestReading:
    def test_the_example_of_the_design(self) -> None:
        recipe = read(
            'bits = "w8a8s4"\ncalibration = { images = 32, batch = 8 }\n'
            '[[rule]]\nname = "norm-inputs"\nkind = "layer_norm"\noperand = ["input"]\n'
            'spec = { scheme = "power_of_two_factor", bits = "r", factors = 3, per = "axis" }\n'
            '[[method]]\nname = "calibrate"\nrounds = 2\n'
        )
        template = SpecTemplate(PowerOfTwoFactor(3), "r", per="axis")
        rule = Rule("norm-inputs", kind=("layer_norm",), operand=("input",), spec=template, observer="minmax")
        assert recipe == Recipe(
            "mine", "Mine", (rule,), (Method("calibrate", {"rounds": 2}),), "", Bits(8, 8, 4, 8), Calibration(32, 8)
        )

    @pytest.mark.parametrize(
        ("body", "parts"),
        [
            ("tilte = 1", ["unknown key 'tilte'", "'title'"]),
            ("calibration = { image = 1 }", ["calibration", "'image'", "'images'"]),
            ("calibration = { images = 0 }", ["calibration", "images = 0", "from 1"]),
            ("calibration = { images = true }", ["images = True", "an integer"]),
            ('bits = "w8"', ["bits", "'w8'", "w<b>a<b>"]),
            ("bits = 8", ["bits = 8", "a string"]),
            ("rule = 3", ["rule = 3", "a list"]),
            ("rule = [3]", ["rule[0] = 3", "a table"]),
            ('[[rule]]\nkind = "linear"', ["a rule", "'name' is missing"]),
            ("[[method]]\nrounds = 1", ["a method", "'name' is missing"]),
            (WEIGHTS + 'observr = "omse"', ["rule 'weights'", "'observr'", "'observer'"]),
            (WEIGHTS + 'observer = "omze"', ["rule 'weights'", "observer 'omze'", "'omse'"]),
            (WEIGHTS + 'kind = "layernorm"', ["rule 'weights'", "kind 'layernorm'", "'layer_norm'"]),
            (WEIGHTS + "kind = []", ["rule 'weights'", "kind = []"]),
            (WEIGHTS + "kind = [1]", ["rule 'weights'", "kind[0] = 1", "a string"]),
            (WEIGHTS + "optional = 1", ["rule 'weights'", "optional = 1", "true or false"]),
            (WEIGHTS + "float = true", ["rule 'weights'", "either float = true or spec"]),
            (WEIGHTS + WEIGHTS, ["rule 'weights'", "another rule"]),
            (WEIGHTS + '[[method]]\nname = "weights"', ["method 'weights'", "another rule"]),
            ('[[rule]]\nname = "calibration"\nfloat = true', ["rule 'calibration'", "taken"]),
            ('[[rule]]\nname = "a.b"\nfloat = true', ["rule 'a.b'", "letters, digits"]),
            ('[[rule]]\nname = "x"', ["rule 'x'", "either float = true or spec"]),
            ('[[rule]]\nname = "x"\nfloat = true\nobserver = "omse"', ["rule 'x'", "remove observer"]),
            ('[[rule]]\nname = "x"\noperand = "weights"\nfloat = true', ["operand 'weights'", "'weight'"]),
        ],
    )
    def test_what_is_wrong_is_refused_by_name(self, body: str, parts: list[str]) -> None:
        with refused("mine.toml", *parts):
            read(body)

    @pytest.mark.parametrize(
        ("spec", "parts"),
        [
            ('bits = "w"', ["'scheme' is missing"]),
            ('scheme = "uniform"', ["'bits' is missing"]),
            ('scheme = "unifrom", bits = "w"', ["'unifrom'", "'uniform'"]),
            ('scheme = "uniform", bits = "q"', ["bits = 'q'", "w, a, s, r, input"]),
            ('scheme = "uniform", bits = 1', ["bits = 1", "2 to 16"]),
            ('scheme = "uniform", bits = true', ["bits = True", "an integer"]),
            ('scheme = "uniform", bits = 8, sined = true', ["'sined'", "'signed'"]),
            ('scheme = "uniform", bits = 8, factors = 4', ["scheme 'uniform'", "'factors'"]),
            ('scheme = "uniform", bits = 8, per = "heads"', ["'heads'", "'head'"]),
            ('scheme = "power_of_two_factor", bits = 8', ['per = "axis"']),
            ('scheme = "log2", bits = 8, signed = true', ["log2", "signed = false"]),
            ('scheme = "log_sqrt2", bits = 9', ["log_sqrt2", "at most 8 bits"]),
            ('scheme = "twin_uniform", bits = 9', ["twin_uniform", "at most 8 bits"]),
            ('scheme = "twin_uniform", bits = 4, signed = true', ["twin_uniform", "unsigned"]),
            ('scheme = "twin_uniform", bits = 4, symmetric = true', ["twin_uniform", "asymmetric"]),
            ('scheme = "twin_uniform", bits = 4, shift = 9', ["shift = 9", "1 to 8"]),
        ],
    )
    def test_what_is_wrong_in_a_spec_is_refused_by_name(self, spec: str, parts: list[str]) -> None:
        with refused("mine.toml: rule 'x'", *parts):
            read(f'[[rule]]\nname = "x"\nspec = {{ {spec} }}')

    def test_a_newer_format_is_refused_before_its_unknown_keys(self) -> None:
        with refused("mine.toml", "format = 2", "newer vitquant"):
            Recipe.from_toml('format = 2\nname = "x"\ntitle = "X"\nnews = 1', "mine.toml")

    def test_format_is_required(self) -> None:
        with refused("mine.toml", "'format' is missing"):
            Recipe.from_toml('name = "x"', "mine.toml")

    def test_what_is_not_toml_is_refused_with_its_line(self) -> None:
        with refused("mine.toml", "not valid TOML", "line 4"):
            read("bits = w8a8")


class TestOverride:
    recipe = Recipe(
        "r",
        "R",
        rules=(Rule("weights", operand=("weight",), spec=EIGHT_BITS, observer="minmax"), Rule("gelu")),
        methods=(Method("search", {"rounds": 2, "loss": {"power": 2}}),),
    )

    @pytest.mark.parametrize("key", ["spec.bits", "bits"])
    def test_spec_keys_are_reached_both_ways(self, key: str) -> None:
        rule = override(self.recipe, [f"weights.{key}=4"]).rules[0]
        assert rule == replace(self.recipe.rules[0], spec=SpecTemplate(Uniform(), 4))

    def test_later_settings_win(self) -> None:
        assert override(self.recipe, ["weights.bits=4", "weights.bits=w"]).rules[0].spec == SpecTemplate(Uniform(), "w")

    def test_values_are_toml(self) -> None:
        rule = override(self.recipe, ['weights.site=["a.*", "b"]', "weights.symmetric=true"]).rules[0]
        assert rule.site == ("a.*", "b")
        assert rule.spec == SpecTemplate(Uniform(), 8, symmetric=True)

    def test_method_settings_may_be_new_or_nested(self) -> None:
        methods = override(self.recipe, ["search.loss.power=1.5", "search.seed=3"]).methods
        assert methods == (Method("search", {"rounds": 2, "loss": {"power": 1.5}, "seed": 3}),)
        assert self.recipe.methods[0].settings == {"rounds": 2, "loss": {"power": 2}}

    def test_a_new_scheme_drops_the_keys_of_the_old(self) -> None:
        factors = override(self.recipe, ["weights.per=axis", "weights.scheme=power_of_two_factor", "weights.factors=2"])
        assert factors.rules[0].spec == SpecTemplate(PowerOfTwoFactor(2), 8, per="axis")
        assert override(factors, ["weights.scheme=log2"]).rules[0].spec == SpecTemplate(Log2(), 8, per="axis")

    def test_a_float_rule_quantizes_once_it_has_a_scheme_and_bits(self) -> None:
        rule = override(self.recipe, ["gelu.bits=a", "gelu.scheme=uniform", "gelu.observer=omse"]).rules[1]
        assert rule == Rule("gelu", spec=SpecTemplate(Uniform(), "a"), observer="omse")

    def test_a_quantizing_rule_becomes_float(self) -> None:
        assert override(self.recipe, ["weights.float=true"]).rules[0] == Rule("weights", operand=("weight",))

    @pytest.mark.parametrize(
        ("setting", "parts"),
        [
            ("weigths.bits=4", ["'weigths'", "'weights'"]),
            ("weights.bist=4", ["'bist'", "'bits'"]),
            ("gelu.spec=4", ["spec = 4", "a table"]),
            ("weights.spec.bist=4", ["'spec.bist'", "'bits'"]),
            ("weights.observers=omse", ["'observers'", "'observer'"]),
            ("weights.name=x", ["'name'"]),
            ("weights.observer=omze", ["rule 'weights'", "'omze'", "'omse'"]),
            ("weights.factors=2", ["rule 'weights'", "scheme 'uniform'", "'factors'"]),
            ("weights.symmetric=yes", ["symmetric = 'yes'", "true or false"]),
            ("weights.bits=[4", ["'[4'", "not a TOML value"]),
            ("weights.bits=4\nx = 3", ["not a TOML value"]),
            ("search.name=x", ["keeps its name"]),
            ("calibration.image=4", ["'image'", "'images'"]),
            ("gelu.bits=4", ["rule 'gelu' is float", "scheme"]),
            ("gelu.observer=omse", ["rule 'gelu'", "observes nothing"]),
            ("search.loss.power.x=1", ["'power' is 2", "no keys"]),
            ("weights=4", ["target.key=value"]),
            ("weights.bits", ["target.key=value"]),
            ("weights..bits=4", ["target.key=value"]),
        ],
    )
    def test_what_does_not_fit_is_refused_by_name(self, setting: str, parts: list[str]) -> None:
        with refused("--set", *parts):
            override(self.recipe, [setting])


class TestAssign:
    def test_a_rule_matches_site_kind_and_operand_of_one_reader_together(self) -> None:
        shared = value("a:layer_norm:input", "b:residual:lhs")
        for rule, matches in (
            (Rule("x", site=("a",), kind=("layer_norm",), optional=True), True),
            (Rule("x", site=("b",), operand=("lhs",), optional=True), True),
            (Rule("x", site=("a",), kind=("residual",), optional=True), False),
            (Rule("x", kind=("layer_norm",), operand=("lhs",), optional=True), False),
        ):
            assert (assign(Recipe("r", "R", (rule,)), Bits(), [shared])["a:input"].rule == "x") is matches

    def test_a_glob_matches_the_site_or_the_path_of_the_module(self) -> None:
        values = [value("blocks.0.mlp.fc1:linear:input:encoder.layer.0.dense")]
        for glob in ("blocks.*.fc1", "encoder.layer.0.*"):
            assert assign(Recipe("r", "R", (Rule("x", site=(glob,)),)), Bits(), values)

    def test_what_comes_from_named_kinds_is_left_to_other_rules(self) -> None:
        kinds = ("layer_norm", "image", "linear", "")
        made = {kind: value(f"{kind or 'x'}:linear:input", made_by=kind) for kind in kinds}
        rule = Rule("x", unless_made_by=("layer_norm", "image"))
        found = assign(Recipe("r", "R", (rule,)), Bits(), list(made.values()))
        assert {kind: found[each.name].rule for kind, each in made.items()} == {
            "layer_norm": "", "image": "", "linear": "x", "": "x",
        }  # fmt: skip
        assert Rule.from_dict(rule.to_dict() | {"float": True}) == rule
        with refused("unknown unless_made_by 'norm'"):
            Rule("x", unless_made_by=("norm",))

    def test_a_value_that_no_rule_matches_stays_float(self) -> None:
        assert assign(Recipe("r", "R"), Bits(), BLOCK[:1]) == {"patch_embed:input": Assignment(None, None, "")}

    def test_the_spec_has_the_bits_and_the_channel_axis(self) -> None:
        rule = Rule("w", operand=("weight",), spec=SpecTemplate(Uniform(), "w", True, True, "axis"), observer="omse")
        found = assign(Recipe("r", "R", (rule,)), Bits(weights=4), BLOCK)
        assert found["blocks.0.attn.qkv:weight"] == Assignment(QuantSpec(4, True, True, PerAxis(0)), "omse", "w")

    @pytest.mark.parametrize(
        ("rule", "parts"),
        [
            (Rule("x", site=("blocks.0.mlp.atc",)), ["blocks.0.mlp.atc", "near:", "blocks.0.mlp.act"]),
            (Rule("x", kind=("product",)), ["no product (there: 1 activation, 1 context, 1 conv, 1 layer_norm"]),
            (
                Rule("x", kind=("scores",), operand=("value",)),
                ["no operand value of scores (there: operands key, query; sites"],
            ),
            (Rule("x", site=("blocks.*",), kind=("conv",)), ["no conv at blocks.* (there:", "1 layer_norm"]),
        ],
    )
    def test_a_rule_that_matches_nothing_is_refused_unless_optional(self, rule: Rule, parts: list[str]) -> None:
        recipe = Recipe("r", "R", (rule, replace(rule, name="y_z", overlay="o")))
        settings = ["x.optional=true", "y_z.optional=true"]
        told = f"--set x.optional=true --set y_z.optional=true (settings={settings})"
        with refused("rule 'x' matches nothing", "(nor does 'y_z')", told, *parts):
            assign(recipe, Bits(), BLOCK)
        assign(override(recipe, settings), Bits(), BLOCK)

    @pytest.mark.parametrize("rule", [Rule("x", operand=("probs",)), Rule("x", kind=("scores", "context"))])
    def test_where_no_attention_is_found_that_is_said(self, rule: Rule) -> None:
        sites = "1 conv, 1 layer_norm, 1 linear, 1 residual)"
        with refused("for no attention is found, a softmax between two products of matrices (there:", sites):
            assign(Recipe("r", "R", (rule,)), Bits(), BLOCK[:5])
        other = Rule("x", site=("patch_embed",), kind=rule.kind, operand=rule.operand)
        with refused("at patch_embed (there:"):
            assign(Recipe("r", "R", (other,)), Bits(), BLOCK)

    def test_bits_that_do_not_fit_the_scheme_are_refused_with_the_place(self) -> None:
        rule = Rule("probs", operand=("probs",), spec=SpecTemplate(Log2(), "s"), observer="unit")
        with refused("rule 'probs' at blocks.0.attn.context:probs with bits w8a8s10", "at most 8 bits"):
            assign(Recipe("r", "R", (rule,)), Bits(probs=10), BLOCK)


class TestOverlay:
    base = Recipe(
        "base",
        "Base",
        rules=(Rule("all", spec=EIGHT_BITS, observer="minmax"),),
        methods=(Method("calibrate"), Method("search", {"rounds": 2, "seed": 1})),
    )

    @staticmethod
    def overlay(name: str, rule: str = "", kind: str = "softmax", override: bool = False, method: str = "") -> Overlay:
        flag = f"override = {str(override).lower()}"
        body = f'[[rule]]\nname = "{rule or name}"\nkind = "{kind}"\nfloat = true\n{flag}\n{method}'
        return Overlay.from_toml(f'format = 1\noverlay = true\nname = "{name}"\ntitle = "Over"\n{body}', name)

    def test_its_rules_come_last_and_win(self) -> None:
        recipe = self.overlay("soft").over(self.base)
        found = assign(recipe, Bits(), BLOCK)
        assert found["blocks.0.attn.softmax:input"] == Assignment(None, None, "soft")
        assert found["output:input"].rule == "all"
        assert recipe.name == "base+soft"

    def test_its_methods_change_settings_or_follow(self) -> None:
        method = '[[method]]\nname = "search"\nrounds = 9\n[[method]]\nname = "fold"\n'
        recipe = self.overlay("soft", method=method).over(self.base)
        assert recipe.methods == (Method("calibrate"), Method("search", {"rounds": 9, "seed": 1}), Method("fold"))

    def test_two_that_set_the_same_value_conflict_unless_the_later_overrides(self) -> None:
        both = self.overlay("second", kind="softmax").over(self.overlay("first").over(self.base))
        with refused("blocks.0.attn.softmax:input", "'first'", "'second'", "override = true"):
            assign(both, Bits(), BLOCK)
        meant = self.overlay("second", override=True).over(self.overlay("first").over(self.base))
        assert assign(meant, Bits(), BLOCK)["blocks.0.attn.softmax:input"].rule == "second"

    def test_two_that_set_different_values_do_not_conflict(self) -> None:
        both = self.overlay("second", kind="pool").over(self.overlay("first").over(self.base))
        assert assign(both, Bits(), BLOCK)["pool:input"].rule == "second"

    def test_rules_of_one_overlay_do_not_conflict(self) -> None:
        more = '[[rule]]\nname = "more"\nkind = "softmax"\nspec = { scheme = "uniform", bits = 4 }'
        found = assign(self.overlay("soft", method=more).over(self.base), Bits(), BLOCK)
        assert found["blocks.0.attn.softmax:input"].rule == "more"

    def test_a_saved_recipe_still_knows_its_overlays(self) -> None:
        both = self.overlay("second").over(self.overlay("first").over(self.base))
        assert Recipe.from_toml(both.to_toml(), "saved") == both

    def test_a_name_of_a_rule_is_taken_once(self) -> None:
        with refused("base+soft", "rule 'all'", "taken"):
            self.overlay("soft", rule="all").over(self.base)

    def test_it_has_rules_and_methods_only(self) -> None:
        with refused("x.toml", "unknown key 'bits'"):
            Overlay.from_toml('format = 1\noverlay = true\nname = "x"\ntitle = "X"\nbits = "w8a8"', "x.toml")


class TestLibrary:
    def test_files_and_names_are_laid_over_each_other_in_order(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            rule = f'[[rule]]\nname = "{name}"\nfloat = true\n'
            text = f'format = 1\noverlay = true\nname = "{name}"\ntitle = "T"\n{rule}'
            (tmp_path / f"{name}.toml").write_text(text)
        recipe = load_recipe(f"minmax+{tmp_path}/two.toml+{tmp_path}/one.toml")
        assert recipe.name == "minmax+two+one"
        assert [(rule.name, rule.overlay) for rule in recipe.rules[-2:]] == [("two", "two"), ("one", "one")]
        assert recipe.rules[:-2] == load_recipe("minmax").rules

    def test_a_byte_order_mark_is_no_part_of_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        path.write_text(HEAD, encoding="utf-8-sig")
        assert load_recipe(str(path)).name == "mine"

    def test_a_path_with_a_plus_works_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "a+b.toml"
        path.write_text(HEAD)
        assert load_recipe(str(path)).name == "mine"

    def test_overlays_are_not_listed_as_recipes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "mine.toml").write_text(HEAD)
        (tmp_path / "over.toml").write_text(HEAD + "overlay = true")
        monkeypatch.setattr(library, "_SHIPPED", tmp_path)
        assert [recipe.name for recipe in available()] == ["mine"]
        assert load_recipe("mine+over").name == "mine+mine"

    def test_an_unknown_name_is_refused_with_the_nearest(self) -> None:
        with refused("'minmaks'", "'minmax'"):
            load_recipe("minmaks")

    def test_a_missing_file_is_refused(self) -> None:
        with refused("no/such.toml", "cannot be read"):
            load_recipe("no/such.toml")

    def test_a_recipe_is_no_overlay_and_an_overlay_no_recipe(self, tmp_path: Path) -> None:
        with refused("omse", "only an overlay"):
            load_recipe("minmax+omse")
        path = tmp_path / "over.toml"
        path.write_text('format = 1\noverlay = true\nname = "over"\ntitle = "Over"')
        with refused("over.toml", "lay it over a recipe"):
            load_recipe(str(path))


class TestShippedRecipes:
    plain = ("minmax", "moving-average", "omse", "percentile")

    def test_all_are_available_under_the_name_of_their_file(self) -> None:
        shipped = {recipe.name: recipe for recipe in available()}
        assert set(self.plain) <= set(shipped)
        assert all(load_recipe(name) == recipe for name, recipe in shipped.items())

    def test_each_says_where_it_comes_from_and_what_it_costs(self) -> None:
        for recipe in available():
            assert all((recipe.title, recipe.source, recipe.expected, recipe.cost)), recipe.name

    @pytest.mark.parametrize("name", plain)
    def test_the_scope_is_that_of_fq_vit(self, name: str) -> None:
        found = assign(load_recipe(name), Bits(3, 4, 5, 6), BLOCK)
        weight = QuantSpec(3, signed=True, symmetric=True, granularity=PerAxis(0))
        bits = {key: a.spec.bits for key, a in found.items() if a.spec is not None and a.spec != weight}
        assert [key for key, a in found.items() if a.spec == weight] == [
            "patch_embed:weight", "blocks.0.attn.qkv:weight",
        ]  # fmt: skip
        assert bits == {
            "patch_embed:input": 8,
            "blocks.0.norm1:input": 6,
            "blocks.0.attn.qkv:input": 4,
            "blocks.0.attn.scores:query": 4,
            "blocks.0.attn.scores:key": 4,
            "blocks.0.attn.softmax:input": 4,
            "blocks.0.attn.context:probs": 5,
            "blocks.0.attn.context:value": 4,
            "blocks.0.residual1:rhs": 6,
            "pool:input": 4,
            "output:input": 4,
        }
        assert all(a.spec in (None, weight) or a.spec == QuantSpec(a.spec.bits) for a in found.values())
        assert found["blocks.0.mlp.act:input"] == Assignment(None, None, "activation-inputs")
        observers = {a.observer for a in found.values() if a.spec not in (None, weight)}
        assert observers == {name}
        weights = {a.observer for a in found.values() if a.spec == weight}
        assert weights == {"minmax"}

    @pytest.mark.parametrize("name", plain)
    def test_what_gelu_shares_with_another_reader_is_quantized(self, name: str) -> None:
        shared = value("act:activation:input", "gate:product:rhs")
        assert assign(load_recipe(name), Bits(), [*BLOCK, shared])["act:input"].rule == "activations"

"""Change single keys of a recipe, as `--set rule.key=value` writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

from vitquant.errors import RecipeError
from vitquant.parsing import parse_value
from vitquant.recipe.recipe import Recipe
from vitquant.recipe.rule import RULE_KEYS, SCHEMES, SPEC_KEYS, scheme_keys
from vitquant.recipe.tables import within
from vitquant.schema import nearest

_SPEC_KEYS = SPEC_KEYS + tuple(key for name in SCHEMES for key in scheme_keys(name))
_RULE_KEYS = tuple(key for key in RULE_KEYS if key not in ("name", "overlay"))


Settings = Sequence[str] | Mapping[str, Any]


def override(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe with some keys set; all settings are applied before the result is checked.

    A rule's keys are its own (`observer`) and those of its spec (`spec.bits`, or `bits` for short).
    Setting `scheme` drops the keys that only the former scheme has. A float rule becomes a quantizing
    one when `scheme` and `bits` are set, and `float=true` drops spec and observer.

    Arguments:
        settings: a mapping of `target.key` to plain values, {"weights.bits": 4}; or texts `target.key=value`, whose
            values are TOML, and a bare word is a string: `norm-inputs.observer=omse`. A target is a rule, a method or
            `calibration`.

    Raises:
        RecipeError: a target or key is unknown (the message names the nearest), or a value does not fit. Keys of
            methods are not checked here: the method itself refuses unknown ones.
    """
    table = deepcopy(recipe.to_dict())
    rules = {rule["name"]: rule for rule in table["rule"]}
    methods = {method["name"]: method for method in table["method"]}
    for written, path, value in _assignments(settings):
        with within(written):
            target, *keys = path.strip().split(".")
            if not keys or not all(keys):
                raise RecipeError("write target.key=value, as in weights.bits=4")
            if target in rules:
                _set_in_rule(rules[target], keys, value())
            elif target in methods:
                _set_in_method(methods[target], keys, value())
            elif target == "calibration":
                table["calibration"][".".join(keys)] = value()
            else:
                raise RecipeError(f"no rule or method {target!r}; {nearest(target, (*rules, *methods, 'calibration'))}")
    for rule in rules.values():
        if "float" in rule and "spec" in rule:
            if "scheme" not in rule["spec"]:
                raise RecipeError(f"--set: rule {rule['name']!r} is float: to quantize it set scheme and bits too")
            del rule["float"]
    with within("--set"):
        return Recipe.from_dict(table)


def _assignments(settings: Settings) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """For each setting its text for messages, its `target.key`, and a function that returns the value."""
    if isinstance(settings, Mapping):
        for path, given in settings.items():
            yield f"settings[{path!r}]", path, partial(deepcopy, given)
        return
    for setting in settings:
        path, equals, text = setting.partition("=")
        yield f"--set {setting!r}", path if equals else "", partial(parse_value, text, RecipeError)


def _set_in_rule(rule: dict[str, Any], keys: list[str], value: object) -> None:
    match keys:
        case ["float"] if value is True:
            rule.pop("spec", None)
            rule.pop("observer", None)
            rule["float"] = True
        case ["spec", key] | [key] if key in _SPEC_KEYS:
            spec = rule.setdefault("spec", {})
            spec[key] = value
            if key == "scheme":
                for foreign in set(spec) - {*SPEC_KEYS, *scheme_keys(str(value))}:
                    del spec[foreign]
        case ["spec"] if not isinstance(value, dict):
            raise RecipeError(f"spec = {value!r} should be a table, as in {{ scheme = 'uniform', bits = 4 }}")
        case [key] if key in _RULE_KEYS:
            rule[key] = value
        case ["spec", *rest] if rest:
            raise RecipeError(f"unknown key {'.'.join(keys)!r}; {nearest('.'.join(rest), _SPEC_KEYS)}")
        case _:
            raise RecipeError(f"unknown key {'.'.join(keys)!r}; {nearest('.'.join(keys), _RULE_KEYS + _SPEC_KEYS)}")


def _set_in_method(method: dict[str, Any], keys: list[str], value: object) -> None:
    *path, last = keys
    for key in path:
        method = method.setdefault(key, {})
        if not isinstance(method, dict):
            raise RecipeError(f"{key!r} is {method!r} and has no keys")
    if keys == ["name"]:
        raise RecipeError("a method keeps its name")
    method[last] = value

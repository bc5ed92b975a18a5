"""What is declared is what is accepted: laws of schemas, and of the parsers in front of them."""

from __future__ import annotations

import json
import math
import os
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitquant.errors import DataError
from vitquant.parsing import parse_json, parse_toml, read_file
from vitquant.schema import (
    DEEPEST,
    PATH,
    Either,
    Flag,
    Integer,
    ListOf,
    Number,
    Plain,
    Table,
    TableOf,
    Text,
    check,
    maybe,
    of_type,
    shown,
    take,
)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=4)
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)
law = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
FILE = Table({"bits": Integer(2, 16)}, {"rules": ListOf(Table({"name": Text(5)}))})


def error_of(value: Any, schema: Any) -> str:
    with pytest.raises(DataError) as error:
        check(value, schema, DataError)
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert len(text) < 2500
    return text


def fits(value: Any, schema: Any) -> bool:
    try:
        check(value, schema, DataError)
    except DataError:
        return False
    return True


@law
@given(values)
def test_whatever_comes_is_accepted_or_one_line_of_ours(value):
    for schema in (Integer(0, 9), Number(0, 1), Flag(), Text(), ListOf(Integer()), TableOf(Plain()), FILE, Plain()):
        if not fits(value, schema):
            error_of(value, schema)


@law
@given(values)
def test_an_integer_is_an_integer_within_its_bounds(value):
    assert fits(value, Integer(2, 16)) == (type(value) is int and 2 <= value <= 16)


@law
@given(values)
def test_a_number_is_finite_and_within_its_bounds(value):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    assert fits(value, Number(-1.5, 1e3)) == (number and -1.5 <= value <= 1e3)
    assert not fits(value, Number()) or math.isfinite(value)


@law
@given(values)
def test_either_is_what_one_of_them_is_and_maybe_is_null_too(value):
    options = Flag(), Integer(0, 5), ListOf(Flag())
    assert fits(value, Either(options)) == any(fits(value, each) for each in options)
    assert fits(value, maybe(Flag())) == (value is None or isinstance(value, bool))


@law
@given(values)
def test_plain_values_are_those_that_json_gives_back(value):
    if fits(value, Plain()):
        assert parse_json(json.dumps(value, allow_nan=False), DataError) == value


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "'bits' is missing"),
        ({"bits": 300}, "bits = 300 should be an integer from 2 to 16"),
        ({"bits": True}, "bits = True should be"),
        ({"bits": 2, "rulse": []}, "unknown key 'rulse'; did you mean 'rules'?"),
        ({"bits": 2, "rules": {}}, "rules = a table should be a list"),
        ({"bits": 2, "rules": [{"name": "x"}, {"name": "x\x1b"}]}, r"rules[1].name = 'x\x1b' should be a string"),
        ({"bits": 2, "rules": [{"name": "longer"}]}, "rules[0].name = 'longer' should be a string of 0 to 5"),
        ([], "[] should be a table"),
    ],
)
def test_an_error_names_the_key_the_value_and_what_it_should_be(value, said):
    assert said in error_of(value, FILE)


def test_keys_that_are_no_words_are_quoted():
    assert error_of({"a.b:c": 1}, TableOf(Flag())).startswith("['a.b:c'] = 1 should be true or false")
    assert "a key = " in error_of({"\n": True}, TableOf(Flag()))
    assert take({"a": 1, "b": "x"}, "a", Integer(), DataError) == 1


def test_texts_hold_no_control_characters_and_paths_no_null():
    for bad in ("\x00", "a\nb", "\u2028", "\ud800", "\x9b"):
        assert not fits(bad, Text())
    assert fits("é\u202f漢", Text())
    assert fits("caf\udce9\n", Text(pattern=PATH))
    assert not fits("a\x00", Text(pattern=PATH))


def test_no_text_turns_the_direction_of_what_a_terminal_shows():
    for letter in "\u061c\u200f\u202e\u2066":
        with pytest.raises(DataError):
            check(f"a{letter}b", Text(), DataError)


def test_types_of_fields_are_schemas():
    assert fits((1, 2), of_type(tuple[int, ...]))
    assert not fits([1.0], of_type(tuple[int, ...]))
    assert fits(None, of_type(str | None))
    assert not fits(1, of_type(str | None))
    assert fits(["x"], of_type(tuple[str, ...] | list[str]))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[1,]", "NaN", "-Infinity", "1e999", "9" * 21, "9" * 5000, '{"a": 1, "a": 2}', "[" * 100_000,
        "[" * 500 + "]" * 500, "[" * (DEEPEST + 2) + "1" + "]" * (DEEPEST + 2),
    ],
)  # fmt: skip
def test_json_that_is_none_is_refused(text):
    with pytest.raises(DataError, match="not valid JSON"):
        parse_json(text, DataError)


def test_bytes_that_are_no_text_are_refused():
    for parse in (parse_json, parse_toml):
        with pytest.raises(DataError, match="not valid"):
            parse(b"\xff\xfe", DataError)


def test_what_people_save_may_begin_with_a_mark_and_is_utf_8():
    for text in ("\ufeffa = 'ä'", "\ufeffa = 'ä'".encode()):
        assert parse_toml(text, DataError) == {"a": "ä"}
    for text in ('\ufeff{"a": "ä"}', '\ufeff{"a": "ä"}'.encode()):
        assert parse_json(text, DataError, edited=True) == {"a": "ä"}
        with pytest.raises(DataError, match="not valid JSON"):
            parse_json(text, DataError)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"):
        with pytest.raises(DataError, match=r"^not valid TOML: it is not text in UTF-8; save it as UTF-8$"):
            parse_toml("# ä\na = 1\n".encode(encoding), DataError)
        with pytest.raises(DataError, match=r"^not valid JSON: it is not text in UTF-8; save it as UTF-8$"):
            parse_json('{"a": "ä"}'.encode(encoding), DataError, edited=True)
    with pytest.raises(DataError, match="save it as UTF-8"):
        parse_toml("a = 1".encode("utf-16-le"), DataError)


@pytest.mark.parametrize(
    "text",
    [
        "a", "a = [", "a = " + "9" * 5000, "a = " + "[" * 50_000, ".".join("a" * 50_000) + " = 1",
        "[" + " . ".join(["'a'"] * 50_000) + "]", "a = 1\na = 2", '"' + "a" * 100_000,
    ],
)  # fmt: skip
def test_toml_that_is_none_is_refused_at_once(text):
    started = time.process_time()
    with pytest.raises(DataError, match="not valid TOML"):
        parse_toml(text, DataError)
    assert time.process_time() - started < 2


def test_what_is_nested_as_deep_as_files_are_is_read():
    text = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(text, DataError) == json.loads(text)
    assert parse_toml('a.b."c.d" = "................................................"', DataError)


def test_only_files_of_a_size_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_file(tmp_path / "file", 5, DataError) == b"12345"
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("file", "5 bytes"), ("pipe", "no file"), ("absent", "No such file"), ("a\x00", "null")):
        with pytest.raises(DataError, match=f"cannot be read.*{said}"):
            read_file(tmp_path / name, 4, DataError)


def test_what_is_shown_is_short():
    for value in (10**5000, "x" * 10**6, [[]] * 10**4, {"a": 1}, b"x" * 1000):
        assert len(shown(value)) < 100

"""YAML without surprises: what is written is read as it was, and what hides something is refused with its line."""

import math
import tracemalloc

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusionblocks as dblocks
from diffusionblocks.system.plain_yaml import LONGEST, dump, parse

TRICKY = [
    *("yes", "no", "on", "off", "y", "012", "0", "-0", "0x1F", "0o7", "1e3", "1_000", ".5", "5.", "~", "", "null",
      "Null", "<<", "="),
    *("2024-01-01", "2024-01-01 10:00:00", "12:30:45", ".inf", "-.inf", ".NaN", "true", "True", "- a", "a: b", "#x",
      "a #b", "*a"),
    *("&a", "!x", "%a", "@a", "`a", " a", "a ", "a\nb", "\n", "\t", "-", "?", ":", "---", "...", "{", "[", "'", '"',
      "\\", "\x00"),
    *("\x85", "\u2028", "\ufeff", "\ud800", "\U0001f600", "x" * 300 + " y" * 100, "C:\\new: x"),
]  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.sampled_from(TRICKY)
KEYS = st.text() | st.sampled_from(TRICKY)
CONTENT = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=12)


def alike(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    return a == b


@settings(max_examples=300, deadline=None)
@given(CONTENT)
def test_what_is_written_is_read_as_it_was(content):
    assert alike(parse(dump(content), "x"), content)


@pytest.mark.parametrize("text", TRICKY)
def test_texts_that_look_like_something_else_stay_texts(text):
    assert parse(dump({text: [text]}), "x") == {text: [text]}


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab:,-[]{}&*!|>'\"#%@`?~0123.\n \\<") | st.text())
def test_every_text_is_read_or_refused_in_one_line(text):
    try:
        parse(text, "it")
        line = ""
    except dblocks.UserError as error:
        line = str(error)
    assert "\n" not in line
    assert line.startswith("it " if line else "")


def test_only_what_the_core_schema_names_is_no_text():
    text = "[yes, no, on, off, 2024-01-01, 12:30:45, 0x1F, 1_000, true, false, null, ~, 12, -3, 1e-3, 1.5, .inf, -.inf]"
    assert parse(text, "x") == [
        *("yes", "no", "on", "off", "2024-01-01", "12:30:45", "0x1F", "1_000", True, False, None, None, 12, -3, 1e-3,
          1.5),
        *(math.inf, -math.inf),
    ]  # fmt: skip
    assert math.isnan(parse(".nan", "x"))
    assert parse("", "x") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nsteps: 012", "line 2: 012 begins with a zero: write 12"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' stands there twice"),
        ("a: {b: 1, b: 2}", "the key 'b' stands there twice"),
        ("a: &x [1]", r"line 1: anchors \(&x\) are not read"),
        ("a: *x", r"aliases \(\*x\) are not read"),
        ("<<: {a: 1}", "merge keys"),
        ("a: <<", "merge keys"),
        ("!!python/object/apply:os.system [x]", "tags .* are not read"),
        ("a: !!int 5", "tags"),
        ("5: x", "a key must be text: put '5' in quotes"),
        ("true: x", "a key must be text"),
        ("? [a]\n: x", "a key must be text"),
        ("[" * 21 + "]" * 21, "more than 20 levels"),
        ("[" * 100_000, "more than 20 levels"),
        ("#" * (LONGEST + 1), "more than 1000000 is not read"),
        ("a: [1", "is not valid YAML, line 1"),
        ("--- 1\n--- 2", "another document"),
        ("a: \x01", "special characters"),
        ("a: " + "9" * 5000, "digits"),
    ],
)
def test_what_hides_something_is_refused_with_its_line(text, message):
    with pytest.raises(dblocks.UserError, match=message):
        parse(text, "file.yaml")


def test_nested_anchors_take_no_memory():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    tracemalloc.start()
    with pytest.raises(dblocks.UserError, match="anchors"):
        parse("\n".join(lines), "bomb.yaml")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_an_object_that_is_met_twice_is_written_twice():
    part = [1, 2]
    assert parse(dump({"a": part, "b": part}), "x") == {"a": [1, 2], "b": [1, 2]}


def test_other_readers_of_yaml_understand_what_is_written():
    recipe = {
        "name": "x",
        "train": {"steps": 5, "learning_rate": 1e-5, "betas": [0.9, 0.99]},
        "note": "a: b",
        "other": None,
    }
    assert yaml.safe_load(dump(recipe)) == recipe

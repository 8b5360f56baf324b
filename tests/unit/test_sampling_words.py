"""What `dblocks sample` is told in words: classes and stop strings."""

import pytest

import diffusionblocks as dblocks
from diffusionblocks.cli.sample import stop_strings
from diffusionblocks.tasks.image_generation import class_numbers

NAMES = ["cat", "dog", "²"]


@pytest.mark.parametrize(
    ("text", "found"), [("0", [0]), ("dog", [1]), ("1, cat", [1, 0]), ("²", [2]), ("-1", [-1]), ("007", [7])]
)
def test_classes_by_number_or_name(text, found):
    assert class_numbers(text, NAMES) == found


@pytest.mark.parametrize("text", ["³", "٣", "cats", "1,,2", "9" * 5000, "1.0", ""])
def test_what_is_no_class_is_one_line(text):
    with pytest.raises(dblocks.UserError, match="unknown class"):
        class_numbers(text, NAMES)


def test_stop_strings_have_line_breaks_and_backslashes():
    assert stop_strings([r"\n\n", "ü", r"a\\b", "日本", r"\x41"]) == ["\n\n", "ü", "a\\b", "日本", "A"]


@pytest.mark.parametrize("text", ["\\", r"a\x", r"\u12", r"\N{no such name}", "日\\", ""])
def test_a_stop_string_that_means_nothing_is_one_line(text):
    with pytest.raises(dblocks.UserError, match="--stop"):
        stop_strings([text])

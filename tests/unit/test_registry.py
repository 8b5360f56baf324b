"""Declarations by name: the package's own, those that are registered, and those of other packages."""

import importlib
import logging

import pytest

from diffusionblocks.errors import UserError
from diffusionblocks.registry import Registry


def names(declaration):
    if not isinstance(declaration, str):
        raise UserError(f"a colour is a text, got {declaration!r}")
    return (declaration,)


def colours(own=("red", "green")):
    return Registry("colour", "tests.colours", lambda: own, names)


class Point:
    """An entry point that gives, or raises, this."""

    def __init__(self, name, found):
        self.name, self.found, self.dist = name, found, None

    def load(self):
        if isinstance(self.found, BaseException):
            raise self.found
        return self.found


@pytest.fixture
def plugins(monkeypatch):
    def declare(*points):
        monkeypatch.setattr("diffusionblocks.registry.entry_points", lambda group: points)

    return declare


def test_own_declarations_come_first_and_are_found_by_name():
    registry = colours()
    assert registry.register("blue") == "blue"
    assert list(registry) == ["red", "green", "blue"]
    assert registry.find("green") == "green"
    assert len(registry) == 3 and "black" not in registry


def test_nothing_is_imported_before_somebody_asks():
    registry = Registry("colour", "tests.colours", lambda: pytest.fail("too early"), names)
    assert registry.what == "colour"


@pytest.mark.parametrize(
    ("declaration", "words"), [("red", "there is a colour 'red' already"), (7, "a colour is a text, got 7")]
)
def test_a_bad_declaration_is_refused_and_leaves_everything_as_it_was(declaration, words):
    class Other(str):
        """Equal in text, another object."""

    registry = colours()
    with pytest.raises(UserError, match=words):
        registry.register(Other(declaration) if isinstance(declaration, str) else declaration)
    assert list(registry) == ["red", "green"]


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="unknown colour 'gren'; did you mean 'green'"):
        colours().find("gren")


def test_plugins_that_cannot_be_taken_are_named_in_one_line_each_and_the_others_are_there(plugins, caplog):
    points = [
        Point("fine", "blue"),
        Point("absent", ImportError("No module named 'nowhere'")),
        Point("broken", RuntimeError("first line\nsecond line")),
        Point("leaving", SystemExit("good bye")),
        Point("taken", "".join(["r", "ed"])),
        Point("wrong", 7),
    ]
    plugins(*points)
    registry = colours()
    with caplog.at_level(logging.WARNING, logger="diffusionblocks"):
        assert list(registry) == ["red", "green", "blue"]
    assert [record.getMessage() for record in caplog.records] == [
        "left out: the colour plugin absent: No module named 'nowhere'",
        "left out: the colour plugin broken: first line",
        "left out: the colour plugin leaving: good bye",
        "left out: the colour plugin taken: there is a colour 'red' already: choose another name",
        "left out: the colour plugin wrong: a colour is a text, got 7",
    ]


def test_loading_that_is_interrupted_begins_anew(plugins):
    plugins(Point("slow", KeyboardInterrupt()))
    registry = colours()
    with pytest.raises(KeyboardInterrupt):
        list(registry)
    plugins()
    assert list(registry) == ["red", "green"]


def test_an_installed_package_is_seen(tmp_path, monkeypatch):
    information = tmp_path / "mine-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[tests.colours]\nfine = mine:COLOUR\nbad = mine:ABSENT\n")
    (tmp_path / "mine.py").write_text("COLOUR = 'blue'\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert list(colours()) == ["red", "green", "blue"]

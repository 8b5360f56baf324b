"""What README and docs say can be done: commands parse, options exist, links lead somewhere, numbers are the JSON's."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
import sys
from pathlib import Path

import pytest

from diffusionblocks import cli
from diffusionblocks.recipes import load_recipe
from diffusionblocks.recipes.keys import places
from diffusionblocks.recipes.load import read_value
from diffusionblocks.tasks import TASKS

ROOT = Path(__file__).parents[2]
OF_OTHERS = ("LOG.md", "errors.md", "security.md", "architecture.md")  # a log keeps old names; errors.md is generated
PAGES = [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in OF_OTHERS)]
COMMAND = re.compile(r"^ {4}dblocks (?:.*\\\n)*.*$|`dblocks ([a-z]+ [^`]+)`", re.MULTILINE)
WRITTEN = {"DIR": "digits", "RECIPE": "digits", "NEW": "FOLDER"}  # a recipe or a folder of the reader's
HELP = {"--help", "--help-all", "-h"}


def read(path: Path) -> str:
    return path.read_text()


def pages() -> list:
    return [pytest.param(path, id=path.name) for path in PAGES]


def commands() -> list:
    """Every command line of the pages as words: those in indented code, and those in the text with arguments."""
    found: dict[str, None] = {}
    for path in PAGES:
        for match in COMMAND.finditer(read(path)):
            line = match[0].strip("` ").replace("\\\n", " ")
            for part in re.split(r" {4,}dblocks ", line):  # two commands on a line
                words = shlex.split(part.removeprefix("dblocks "), comments=True)
                found.setdefault(shlex.join(word.removesuffix("...") for word in words))
    return [line for line in found if not HELP & set(line.split())]


@functools.cache
def known_keys() -> frozenset[str]:
    """Dotted keys of all kinds of task."""
    return frozenset(key for task in TASKS for key in places(task))


def test_the_pages_have_commands():
    assert len(commands()) > 40


@pytest.mark.parametrize("line", commands())
def test_every_command_is_one_that_the_program_takes(line, monkeypatch):
    """Parsed by the program's own parser; what it would do with a recipe is done until the data would be read."""
    seen = []
    for name, command in list(cli.COMMANDS.items()):
        noted = dataclasses.replace(command, run=lambda arguments, rest: seen.append((arguments, rest)))
        monkeypatch.setitem(cli.COMMANDS, name, noted)
    words = [WRITTEN.get(word, word) for word in shlex.split(line)]
    assert cli.main(words) == 0, line
    arguments, rest = seen[0]
    pairs = [word.removeprefix("--").partition("=")[::2] for word in rest]
    overrides = [(key.replace("-", "_"), read_value(key.replace("-", "_"), text or "true")) for key, text in pairs]
    recipe = {"adapt": "adapt"}.get(arguments.command, getattr(arguments, "recipe", None))
    if recipe is not None and arguments.command in ("train", "compare", "adapt", "plan"):
        preset = getattr(arguments, "preset", None)
        load_recipe(recipe, [*overrides, *([("preset", preset)] if preset else [])])
    else:
        assert {key for key, _ in overrides if "." in key} <= known_keys(), line


@pytest.mark.parametrize("path", pages())
def test_every_option_that_is_named_exists(path):
    known, text = known_keys(), read(path)
    groups = {key.partition(".")[0] for key in known}
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]*\.[a-z][a-z-]*)", text)}
    bare = {key for key in re.findall(r"`([a-z_]+\.[a-z_]+)\b(?![(.])", text) if key.partition(".")[0] in groups}
    assert flags | bare <= known, (flags | bare) - known


@pytest.mark.parametrize("path", pages())
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", read(path)):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists(), target
        if anchor:
            heads = {
                re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")
                for head in re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
            }
            assert anchor in heads, target


@pytest.mark.parametrize("path", pages())
def test_lines_are_not_too_long(path):
    long = [line for line in read(path).splitlines() if len(line) > 120]
    assert [line for line in long if not line.startswith("|") or path.name == "README.md"] == []


def test_the_readme_is_short():
    assert len(read(ROOT / "README.md").splitlines()) <= 130


def test_the_tables_of_results_are_those_of_the_json(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import tables

    page = read(tables.PAGE)
    assert set(tables.MARKED.findall(page)) == set(tables.TABLES)
    assert tables.filled(page) == page

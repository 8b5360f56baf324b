"""A task from outside of the package works in every command; what is wrong with a plugin is one line."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import diffusionblocks as dblocks
from diffusionblocks.options import option
from diffusionblocks.registry import Registry
from diffusionblocks.tasks import TASKS, Task

ROOT = Path(__file__).parents[2]
RECIPE = """
name: numbers
task: {kind: magnitude}
data: {source: digits, image_size: 8, channels: 1}
model: {hidden_size: 16, num_hidden_layers: 4, num_attention_heads: 2, intermediate_size: 32, patch_size: 4}
blocks: {num_blocks: 2}
train: {steps: 4, batch_size: 16, device: cpu}
"""
# Everything in one process, in which the task is registered.
SCRIPT = """
import json, sys
import diffusionblocks
from diffusionblocks.cli import main
from tests.new_task import Magnitude
assert diffusionblocks.register_task(Magnitude) is Magnitude
for words in json.loads(sys.argv[1]):
    assert main(words) == 0, words
"""
PLUGINS = """[diffusionblocks.tasks]
magnitude = tests.new_task:Magnitude
taken = bad_plugins:Taken
unfinished = bad_plugins:Unfinished
broken = no_such_package:Task
"""
BAD = """
from dataclasses import dataclass
from diffusionblocks.tasks import Classification, Task

@dataclass(kw_only=True)
class Taken(Classification):
    pass

@dataclass(kw_only=True)
class Unfinished(Task):
    kind: str = "unfinished"
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "numbers.yaml"
    path.write_text(RECIPE)
    return str(path)


def python(*words, extra=""):
    paths = [str(ROOT), str(Path(dblocks.__file__).parents[1]), str(extra)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=250)


def test_a_registered_task_works_in_every_command(recipe, tmp_path):
    run, page = str(tmp_path / "run"), str(tmp_path / "page.html")
    commands = [
        ["train", recipe, "--preset", "sharp", "--task.decimals", "3", "--output-dir", run],
        ["evaluate", run, "--evaluate-on", "validation", "--json"],
        ["sample", run, "--num", "3", "--steps", "1", "--output", str(tmp_path / "numbers.txt")],
        ["report", run, "--output", page],
        ["plan", recipe, "--memory", "8GiB", "--num-blocks", "2"],
    ]
    done = python("-c", SCRIPT, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["metrics"]) == ["absolute_error", "error_of_the_mean"]
    assert 0 < summary["metrics"]["absolute_error"]["value"] < 9
    evaluated = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert evaluated["evaluated_on"] == "validation"
    assert evaluated["metrics"]["absolute_error"] != summary["metrics"]["absolute_error"]
    kept = (tmp_path / "run" / "config.yaml").read_text()
    assert "width: 0.1" in kept and "decimals: 3" in kept
    numbers = (tmp_path / "numbers.txt").read_text().split()
    assert len(numbers) == 3 and all(len(number.partition(".")[2]) == 1 for number in numbers)
    assert "How large they look" in (tmp_path / "page.html").read_text()


def test_tasks_of_installed_packages_are_found_and_bad_ones_are_left_out(recipe, tmp_path):
    package = tmp_path / "site" / "strangers-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(PLUGINS)
    (tmp_path / "site" / "bad_plugins.py").write_text(BAD)
    words = ["compare", recipe, "--methods", "diffusionblocks", "--output-dir", str(tmp_path / "both")]
    done = python("-m", "diffusionblocks.cli", *words, "--json", extra=tmp_path / "site")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert result["method"] == "diffusionblocks" and "absolute_error" in result["metrics"]
    left_out = [line for line in done.stderr.splitlines() if line.startswith("left out")]
    assert left_out == [
        "left out: the task plugin taken of the package strangers: there is a task 'classification' already: choose "
        "another name",
        "left out: the task plugin unfinished of the package strangers: the task Unfinished misses target, data, "
        "step, evaluate",
        "left out: the task plugin broken of the package strangers: No module named 'no_such_package'",
    ]


class Plain(dblocks.Classification):
    pass


@dataclass(kw_only=True)
class Nameless(dblocks.Classification):
    kind: str = ""


@dataclass(kw_only=True)
class Unsized(dblocks.Classification):
    kind: str = "unsized"
    size: int


@dataclass(kw_only=True)
class Coloured(dblocks.Classification):
    target: ClassVar = "colour"
    kind: str = "coloured"


@dataclass(kw_only=True)
class Heard(dblocks.Classification):
    data: ClassVar = dict
    kind: str = "heard"


@dataclass(kw_only=True)
class Idle(Task):
    target: ClassVar = "label"
    data: ClassVar = dblocks.DataConfig
    kind: str = "idle"


@dataclass(kw_only=True)
class Greedy(dblocks.Classification):
    kind: str = "greedy"
    levels: str = option("all", group="noise")


@dataclass(kw_only=True)
class Untold(dblocks.Classification):
    kind: str = "untold"
    size: "Absent" = 1  # noqa: F821


@dataclass(kw_only=True)
class Wandering(dblocks.Classification):
    kind: str = "../up"


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Greedy, "the task Greedy calls its option levels noise.levels: the group of a task's option is objective"),
        (Untold, "the task Untold has an option whose type cannot be told: name 'Absent' is not defined"),
        (Wandering, "the kind of the task Wandering must be a plain file name"),
        (dict, "a task is a subclass of diffusionblocks.tasks.Task, got <class 'dict'>"),
        (Plain, "the task Plain is no dataclass"),
        (Nameless, "the task Nameless misses kind"),
        (Unsized, "the task Unsized misses a default of size"),
        (Idle, "the task Idle misses step, evaluate"),
        (Coloured, "the task Coloured has the target 'colour': it must be label or image or"),
        (Heard, "the task Heard takes dict: data must be DataConfig or TextConfig"),
        (dblocks.Classification(), "a task is a subclass"),
    ],
)
def test_a_task_that_misses_a_part_is_one_line(task, message):
    before = dict(TASKS)
    with pytest.raises(dblocks.UserError, match=message) as raised:
        dblocks.register_task(task)
    assert "\n" not in str(raised.value)
    assert dict(TASKS) == before


def test_a_taken_kind_is_refused_and_the_same_task_again_is_not():
    assert dblocks.register_task(dblocks.Classification) is TASKS["classification"]

    @dataclass(kw_only=True)
    class Mine(dblocks.Classification):
        pass

    with pytest.raises(dblocks.UserError, match="there is a task 'classification' already: choose another name"):
        dblocks.register_task(Mine)
    assert TASKS["classification"] is dblocks.Classification


def test_an_entry_point_is_loaded_when_somebody_asks(monkeypatch):
    """And another package's exception of any kind is no reason to stop."""
    asked = []

    class Point:
        name, dist = "mine", None

        def load(self):
            asked.append("load")
            raise RuntimeError("no licence\nfor this machine")

    monkeypatch.setattr("diffusionblocks.registry.entry_points", lambda group: asked.append(group) or [Point()])
    tasks = Registry("task", "diffusionblocks.tasks", lambda: [dblocks.Classification], lambda task: (task.kind,))
    assert asked == []
    assert list(tasks) == ["classification"]
    assert asked == ["diffusionblocks.tasks", "load"]

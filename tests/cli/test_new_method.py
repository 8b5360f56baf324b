"""A method from outside the package is one file and an entry point: every command knows it. So does a bad one, in one
line."""

import json
import os
import subprocess
import sys

import pytest
from transformers import ViTForImageClassification

import diffusionblocks as dblocks
from diffusionblocks.blocks.model import EndToEndModel
from diffusionblocks.methods.base import Step
from diffusionblocks.networks.registry import take_apart
from diffusionblocks.planning.card import needed

HALF_DEPTH = """
import diffusionblocks as dblocks
from diffusionblocks.blocks.model import EndToEndModel
from diffusionblocks.methods.base import Step
from diffusionblocks.networks.registry import take_apart


class HalfDepth(dblocks.Method):
    name = "half-depth"
    description = "the first half of the layers, end to end"

    def build(self, recipe, network):
        parts = take_apart(network, recipe.task.target)
        return EndToEndModel(parts, (len(parts.layers) + 1) // 2)

    def rows(self, recipe):
        return (False,)

    def steps(self, recipe, sizes):
        half = sum(sizes) // 2
        return [Step((half, sum(sizes) - half))]  # what trains, and what is left away

    def training(self, recipe, sizes, recomputed=1.0):
        return sum(sizes) / 2 * recomputed

    def inference(self, recipe, sizes):
        return sum(sizes) / 2

    def rank(self, recipe, tied):
        return 5

    def reason(self, recipe, tied):
        return "half a network is better than none"


HALF = HalfDepth()
"""
SMALL = ["--model.hidden-size", "64", "--model.num-hidden-layers", "4", "--num-blocks", "2", "--device", "cpu"]
SHORT = [*SMALL, "--steps", "4", "--batch-size", "8", "--train.branch-at", "0"]


def install(folder, content, points):
    """A package of one file with entry points, as pip leaves it."""
    (folder / "half_depth.py").write_text(content)
    info = folder / "half_depth-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: half-depth\nVersion: 1.0\n")
    lines = [f"{name} = {where}" for name, where in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[diffusionblocks.methods]", *lines]) + "\n")
    return folder


def python(folder, *words):
    path = os.pathsep.join([str(folder), *sys.path])
    return subprocess.run(
        [sys.executable, *map(str, words)], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )


def command(folder, *words):
    """What `dblocks` prints where the package in `folder` is installed."""
    done = python(folder, "-m", "diffusionblocks.cli", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return install(tmp_path_factory.mktemp("site"), HALF_DEPTH, {"half-depth": "half_depth:HALF"})


def test_it_is_listed_trained_and_compared(installed, tmp_path):
    assert "half-depth                  the first half of the layers, end to end" in command(
        installed, "train", "--help"
    )
    words = ["compare", "digits", *SHORT, "--methods", "end-to-end,half-depth", "--output-dir", tmp_path, "--json"]
    whole, half = json.loads(command(installed, *words))["results"]
    assert half["method"] == "half-depth" and half["layer_evaluations"] == whole["layer_evaluations"] == 4 * 8 * 4
    assert half["samples_seen"] == 2 * whole["samples_seen"]  # the same budget buys twice the steps
    network = ViTForImageClassification.from_pretrained(tmp_path / "half-depth" / "seed-0" / "model")
    assert network.config.num_hidden_layers == 2


def test_it_is_planned_with_its_own_step_and_cost_and_can_be_recommended(installed):
    def planned(memory):
        return json.loads(
            command(installed, "plan", "digits", *SMALL, "--batch-size", "1", "--memory", memory, "--json")
        )

    rows = {row["method"]: row for row in planned("1GiB")["rows"]}
    half, whole = rows["half-depth"], rows["end-to-end"]
    assert [row["layer_evaluations_per_sample"] for row in (half, whole)] == [2, 4]
    assert [row["inference_layers"] for row in (half, whole)] == [2, 4]
    assert half["predicted"] == rows["shallow"]["predicted"]  # with two blocks: the same network
    assert half["command"].endswith("--method half-depth")
    best = planned(f"{needed(half['predicted']['total'], half['target']) + (1 << 16)}B")["recommendation"]
    assert best["method"] == "half-depth" and best["reason"].startswith("half a network is better than none")


def test_a_script_registers_it(installed, tmp_path):
    """Without an entry point."""
    (tmp_path / "half_depth.py").write_text(HALF_DEPTH)
    script = (
        "import sys, half_depth, diffusionblocks; from diffusionblocks.cli import main; "
        "diffusionblocks.register_method(half_depth.HALF); sys.exit(main(sys.argv[1:]))"
    )
    words = ["train", "digits", *SHORT, "--method", "half-depth", "--output-dir", tmp_path / "run", "--json"]
    done = python(tmp_path, "-c", script, *words)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["method"] == "half-depth"
    assert summary["result"] == {"folder": "model", "format": "transformers", "needs_diffusionblocks": False}
    missing = python(tmp_path, "-m", "diffusionblocks.cli", "evaluate", tmp_path / "run")  # where nobody registers it
    assert missing.returncode == 2 and missing.stderr.startswith("dblocks: unknown method 'half-depth'")


BAD = """
import diffusionblocks as dblocks


class Taken(dblocks.Method):
    name, description = "exact", "another one"

    def build(self, recipe, network):
        raise AssertionError


class NoModel(dblocks.Method):
    name, description = "no-model", "it does not say how its model is built"


TAKEN, NO_MODEL, NO_METHOD = Taken(), NoModel(), "exact"
"""


def test_a_bad_plugin_is_one_line_that_names_it_and_everything_else_goes_on(tmp_path):
    points = {"taken": "TAKEN", "part": "NO_MODEL", "other": "NO_METHOD", "absent": "NOTHING"}
    points = {name: f"half_depth:{where}" for name, where in points.items()} | {"broken": "no_such_module:METHOD"}
    install(tmp_path, BAD, points)
    assert "digits" in command(tmp_path, "recipes")
    done = python(tmp_path, "-m", "diffusionblocks.cli", "train", "digits", *SHORT, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "left out" in line]
    for name, reason in {
        "taken": "there is a method 'exact' already",
        "part": "the method no-model misses build",
        "other": "a method is an instance of diffusionblocks.Method, got 'exact'",
        "absent": "has no attribute 'NOTHING'",
        "broken": "No module named 'no_such_module'",
    }.items():
        (line,) = [line for line in said if f" {name} of the package half-depth" in line]
        assert reason in line
    assert len(said) == len(points)


def test_a_method_with_rows_in_the_plan_needs_a_rank_and_a_reason():
    class Half(dblocks.Method):
        name, description = "half", "half of the layers"

        def build(self, recipe, network):
            return EndToEndModel(take_apart(network, recipe.task.target), 2)

        def rows(self, recipe):
            return (False,)

    with pytest.raises(dblocks.UserError, match="the method half misses rank, reason"):
        dblocks.register_method(Half())
    with pytest.raises(dblocks.UserError, match="a method is an instance of"):
        dblocks.register_method(Half)
    assert Half().steps(None, [2, 4]) == [Step((6,))]  # ordinary training of the whole network, unless it says more

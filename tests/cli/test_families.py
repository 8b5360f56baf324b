"""A network family from outside of the package: one file, and one line in another package's pyproject.toml."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "phi.py"
TINY = ["--steps", "2", "--batch-size", "2", "--data.length", "32", "--evaluation.num-samples", "0", "--device", "cpu"]
TINY += ["--model.hidden-size", "16", "--model.num-attention-heads", "2", "--model.num-hidden-layers", "3"]
TINY += ["--model.intermediate-size", "32"]


@pytest.fixture
def dblocks(tmp_path):
    """The command line beside an installed package that declares the family of the example, and one that is broken."""
    information = tmp_path / "mine-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    declared = "[diffusionblocks.networks]\nphi = phi:PHI\nbroken = nowhere:FAMILY\n"
    (information / "entry_points.txt").write_text(declared)
    shutil.copy(EXAMPLE, tmp_path / "phi.py")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])

    def run(*words):
        command = [sys.executable, "-m", "diffusionblocks.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})

    return run


def test_a_declared_family_is_trained_and_loaded_and_a_broken_one_is_named(dblocks, tmp_path):
    words = ["train", "lm-pydocs", *TINY, "--model.model-class", "PhiForCausalLM"]
    out = dblocks(*words, "--output-dir", str(tmp_path / "run"), "--json")
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout)["num_blocks"] == 3
    left_out = [line for line in out.stderr.splitlines() if "left out" in line]
    assert left_out == ["left out: the network class plugin broken of the package mine: No module named 'nowhere'"]
    out = dblocks("evaluate", str(tmp_path / "run"), "--json")
    assert out.returncode == 0, out.stderr


def test_the_example_runs():
    out = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "block   layers  noise range" in out.stdout

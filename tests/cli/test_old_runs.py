"""Runs that an earlier version began are finished by this one, and end with the weights that the earlier one reached.

tests/fixtures/earlier/NAME holds what commit 042a1b0 had left when it was killed behind its checkpoint, and in
`expected` the weights that it ended with when it was not killed. `branching` (digits, the paper's blocks that part
after half of the run), `features` (next tokens, a sweep, heads that settle first, trust) and `exact` (one backward
pass).
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusionblocks.cli import main
from diffusionblocks.experiments.run import read_recipe

RUNS = Path(__file__).parents[1] / "fixtures" / "earlier"
TINY = (
    "--model.hidden-size 8 --model.num-attention-heads 1 --model.num-hidden-layers 2 --model.intermediate-size 8 "
    "--device cpu --batch-size 4 --num-blocks 2 --train.keep-checkpoints 5 --steps 8 --train.checkpoint-every 6"
)
TEXT = "--data.split contiguous --data.path texts --data.length 16 --data.tokenizer characters --task.num-samples 0"
FEATURES = "--preset features --blocks.head-layers 1 --train.heads-first 0.3 --train.trust true --train.visit-steps 2"
COMMANDS = {  # as they were given to the earlier version
    "branching": f"digits {TINY}",
    "features": f"lm-folder --method diffusionblocks {FEATURES} {TEXT} {TINY}",
    "exact": f"lm-folder --method exact --train.order backward {TEXT} {TINY}",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the old commands were given: their paths are relative."""
    shutil.copytree(RUNS, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    return tmp_path / "runs"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_of_an_earlier_version_ends_as_it_would_have(name, folder, capsys):
    assert main(["train", *COMMANDS[name].split(), "--output-dir", name, "--json"]) == 0
    out, error = capsys.readouterr()
    assert re.search(r"resuming after [68] block steps", error)
    summary = json.loads(out)
    assert summary["block_steps"] == 16
    last = folder / name / "checkpoints" / "step-16"
    for path in sorted((folder / name / "expected").iterdir()):
        found, expected = load_file(last / path.name), load_file(path)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():  # kernels of another processor or version of torch round otherwise
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5, msg=f"{path.name}: {key}")


@pytest.mark.parametrize("name", COMMANDS)
def test_its_recipe_is_read(name, folder):
    recipe = read_recipe(folder / name)
    assert recipe.blocks.num_blocks == 2
    assert recipe.train.steps == 8
    assert os.listdir(folder / name / "expected")

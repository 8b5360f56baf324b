"""Predictions for a card, made without one, agree with what an H100 measured (benchmarks/results/memory-h100.json)."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = json.loads((BENCHMARKS / "results" / "memory-h100.json").read_text())["rows"]


def name(row):
    settings = (row["family"], row["method"], row["num_blocks"], *row["train"], row["blocks"].get("context"))
    return "-".join(str(word) for word in settings if word)


def chosen():
    """Of every network, the whole one and one in blocks; both kinds of recomputation; what was furthest from its
    prediction."""
    for number in (3, 7, 12, 13, 18, 21, 22, 24, 27):
        yield pytest.param(ROWS[number], id=name(ROWS[number]))


@pytest.mark.parametrize("row", chosen())
def test_prediction_agrees_with_an_h100(row, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    memory = importlib.import_module("memory")
    predicted = memory.total(row, memory.planned(row, "cuda"))
    assert predicted == pytest.approx(row["measured"], rel=0.1)


SECOND_DEVICE = """
import json, os, sys
import torch
from tests.second_device.device import register

register()
torch.sim._initialized = True  # as that of a card is

import memory
from diffusionblocks.planning import predict

found = {}
rows = json.loads(memory.H100.read_text())["rows"]
for device in ("cpu", "sim"):
    predict.traced_device = lambda target: device
    made = [memory.planned(rows[int(number)], "cuda") for number in sys.argv[1:]]
    found[device] = [predictor.at(predictor.config.batch_size).device.total for predictor in made]
print(json.dumps(found), flush=True)
os._exit(0)  # the device's threads have no end of their own
"""


def test_steps_are_traced_on_the_tensors_of_another_device():
    """As on a card: nothing of a step is made elsewhere, and what its other thread computes is counted."""
    paths = os.pathsep.join([str(BENCHMARKS.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", SECOND_DEVICE, "20", "24"]  # `exact`, and recomputed masked text
    out = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS, env=environment, check=True).stdout
    found = json.loads(out.splitlines()[-1])
    assert found["sim"] == pytest.approx(found["cpu"], rel=1e-3)

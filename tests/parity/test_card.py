"""Predictions for a card, made without one, agree with what an H100 measured (benchmarks/results/memory-h100.json)."""

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = json.loads((BENCHMARKS / "results" / "memory-h100.json").read_text())["rows"]


def name(row):
    settings = (row["family"], row["method"], row["num_blocks"], *row["train"], row["blocks"].get("context"))
    return "-".join(str(word) for word in settings if word)


def chosen():
    """Of every network, the whole one and one in blocks; both kinds of recomputation; what was furthest from its prediction."""
    for number in (3, 7, 12, 13, 18, 21, 22, 24, 27):
        yield pytest.param(ROWS[number], id=name(ROWS[number]))


@pytest.mark.parametrize("row", chosen())
def test_prediction_agrees_with_an_h100(row, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("diffusionblocks.memory.predict.capability", lambda: (9, 0))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    made = importlib.import_module("memory").planned(row, "cuda")
    predicted = made.at(made.config.batch_size, made.config.accumulation).device.total
    assert predicted == pytest.approx(row["measured"], rel=0.1)

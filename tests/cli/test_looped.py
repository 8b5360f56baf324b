"""Looped language models on the command line."""

import json

import pytest

import diffusionblocks as dblocks
from diffusionblocks.cli import main
from diffusionblocks.experiments.run import load_run
from diffusionblocks.methods import METHODS
from diffusionblocks.planning.card import RESERVED
from diffusionblocks.planning.plan import cheaper, explain
from diffusionblocks.recipes import Recipe, load_recipe
from tests.cli.test_text import run_json
from tests.unit.test_text import POEM

SETTINGS = [
    *("--steps", "3", "--batch-size", "8", "--model.hidden-size", "16", "--model.intermediate-size", "32"),
    *("--data.length", "16", "--evaluation.num-samples", "2", "--blocks.condition-width", "8"),
    *(
        "--objective.mean-iterations",
        "4",
        "--objective.truncation",
        "2",
        "--sampling.iterations",
        "3",
        "--evaluation.curve",
        "1,3",
    ),
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (folder / f"{number:02d}.txt").write_text(f"text {number} " + POEM * (3 + number % 3))
    cache = tmp_path_factory.mktemp("cache")
    return [*SETTINGS, "--data.source", "folder", "--data.path", str(folder), "--data.cache-dir", str(cache)]


@pytest.fixture(scope="module")
def compared(settings, tmp_path_factory):
    """The folder of a comparison of all methods."""
    folder = tmp_path_factory.mktemp("runs") / "compare"
    methods = "end-to-end,shallow,diffusionblocks"
    words = ["compare", "looped-pydocs", *settings, "--methods", methods, "--jobs", "2", "--output-dir", str(folder)]
    assert main(words) == 0
    return folder


def test_a_comparison_counts_layer_applications(compared):
    results = {row["method"]: row for row in json.loads((compared / "compare.json").read_text())["results"]}
    spent = {method: row["layer_evaluations"] for method, row in results.items()}
    task = dblocks.RecurrentLM(mean_iterations=4, truncation=2)
    recipe = Recipe(task=task, blocks=dblocks.BlocksConfig(prelude=1, coda=1))
    whole = METHODS["end-to-end"].training(recipe, [4])  # of three steps, on average
    assert spent["shallow"] == spent["diffusionblocks"] == round(3 * whole / 4) * 4 * 8
    # One and three iterations are measured besides the one of the recipe; a network that runs once has one.
    for method in ("end-to-end", "diffusionblocks"):
        assert {"nats_per_token", "nats_at_1", "nats_at_3", "perplexity"} <= set(results[method]["metrics"])
    assert "nats_at_3" not in results["shallow"]["metrics"]
    assert "iterations K at inference" in (compared / "report.html").read_text()
    assert results["shallow"]["layers_per_token"] == {"training": 4, "inference": 4}
    assert results["diffusionblocks"]["layers_per_token"] == {"training": 4, "inference": 1 + 3 * 5}
    assert results["end-to-end"]["layers_per_token"]["inference"] == 2 + 2 * 3
    peak = {method: row["peak_memory"]["total"] for method, row in results.items()}
    assert peak["shallow"] < peak["end-to-end"]


@pytest.mark.parametrize("method", ["end-to-end", "diffusionblocks"])
def test_texts_and_iterations_at_inference(compared, method, capsys):
    run = str(compared / method / "seed-0")
    few, many = (run_json(capsys, "sample", run, "--num", "2", "--iterations", k) for k in ("1", "4"))
    assert few["iterations_per_token"] == 1 and many["iterations_per_token"] == 4
    assert few["layer_evaluations_per_text"] == 16 * 4  # a window: with a single iteration every layer runs once
    assert few["layer_evaluations_per_text"] < many["layer_evaluations_per_text"]
    early = run_json(capsys, "sample", run, "--num", "2", "--iterations", "8", "--early-exit", "10")
    assert early["iterations_per_token"] == 2  # the first two predictions are close enough
    assert len(early["texts"]) == 2
    again = run_json(capsys, "evaluate", run, "--sampling.iterations", "1", "--evaluation.num-samples", "0")
    assert again["sampling"]["iterations"] == 1
    assert again["layers_per_token"]["inference"] == 4


def test_what_runs_once_runs_once(compared, capsys):
    run = str(compared / "shallow" / "seed-0")
    for words in (["sample", run, "--iterations", "4"], ["evaluate", run, "--sampling.iterations", "4"]):
        assert main(words) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_running_out_of_memory_names_what_would_fit(settings):
    words = [word.removeprefix("--") for word in settings]
    overrides = [(key.replace("-", "_"), value) for key, value in zip(words[::2], words[1::2], strict=True)]
    overrides = [(key, int(value) if value.isdigit() else value) for key, value in overrides]
    recipe = load_recipe("looped-pydocs", [*overrides, ("method", "end-to-end")])
    now, _ = cheaper(recipe, "looped-pydocs", 0)
    text = explain(recipe, "looped-pydocs", 0, now.device.total * 0.99 * RESERVED)
    assert "--objective.truncation 1" in text and "--method diffusionblocks" in text


def test_a_run_says_what_it_holds_and_loads(compared, capsys):
    run = load_run(compared / "diffusionblocks" / "seed-0")
    assert "4 + 6 (K - 1) with K iterations" in run.model.summary()
    whole = dblocks.load(compared / "end-to-end" / "seed-0" / "model")
    assert isinstance(whole, dblocks.LoopedNetwork)
    for words in (["export", compared / "end-to-end" / "seed-0"], ["export", compared / "diffusionblocks" / "seed-0"]):
        assert main([str(word) for word in words]) == 2
        assert "needs this package" in capsys.readouterr().err


def test_a_plan_counts_layer_applications(capsys):
    found = run_json(capsys, "plan", "looped-pydocs", "--data.length", "64", "--objective.truncation", "4")
    rows = {row["method"]: row for row in found["rows"]}
    assert set(rows) == {
        *("end-to-end", "checkpointing", "shallow", "diffusionblocks", "diffusionblocks + checkpointing")
    }
    assert rows["diffusionblocks"]["layer_evaluations_per_sample"] == 4
    assert rows["end-to-end"]["layer_evaluations_per_sample"] == pytest.approx(2 + 2 * (4 + 12 / 3), rel=0.01)
    assert rows["end-to-end"]["inference_layers"] == 2 + 2 * 16
    assert rows["diffusionblocks"]["inference_layers"] == 1 + 3 * (2 * 16 - 1)
    sizes = [rows[method]["predicted"]["total"] for method in ("shallow", "diffusionblocks", "end-to-end")]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sampling.iterations", "0"], "at least 1"),
        (["--objective.truncation", "9", "--objective.mean-iterations", "8"], "longer than objective.mean_iterations"),
        (["--num-blocks", "2"], "not split"),
        (["--blocks.layers-per-block", "4"], "looped.prelude and looped.coda"),
        (["--method", "exact"], "not for looped networks"),
        (["--method", "diffusionblocks-features"], "not for looped networks"),
        (["--looped.prelude", "3"], "leave no layer"),
        (["--sampling.steps", "3"], "unknown key"),
    ],
)
def test_what_cannot_be_is_one_line(settings, words, message, tmp_path, capsys):
    assert main(["train", "looped-pydocs", *settings, *words, "--output-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_start_from_the_other_kind(compared, settings, tmp_path, capsys):
    for method, start in (("end-to-end", "diffusionblocks"), ("diffusionblocks", "end-to-end")):
        folder = tmp_path / method
        words = ["train", "looped-pydocs", *settings, "--method", method, "--output-dir", str(folder)]
        assert main([*words, "--model.start", str(compared / start / "seed-0")]) == 2
        assert "holds" in capsys.readouterr().err
        assert main([*words, "--model.start", str(compared / method / "seed-0")]) == 0

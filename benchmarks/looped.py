"""Looped networks on looped-pydocs: quality at equal training compute and at equal samples, and the cost of a training
step.

    python benchmarks/looped.py quality --jobs 2     every method, three seeds
    python benchmarks/looped.py speed                training steps, alternating, one thread
    python benchmarks/looped.py writing              early exit and its cost, with the first trained runs of `quality`

Each part writes benchmarks/results/looped-PART.json. Finished runs below --output-dir are reused.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from diffusionblocks.cli import main as dblocks
from diffusionblocks.evaluation.judges import distinct_2, entropy
from diffusionblocks.experiments.run import load_run, prepare
from diffusionblocks.experiments.sample import sample
from diffusionblocks.recipes import load_recipe
from diffusionblocks.training.task import Asked
from environment import describe
from timing import alternating, ratio

RESULTS = Path(__file__).parent / "results"
RECIPE = "looped-pydocs"
COMPARISONS = {  # methods, and what else
    "layer-evaluations": (["end-to-end", "shallow", "diffusionblocks", "diffusionblocks-paper"], []),
    "samples": (["diffusionblocks", "shallow"], ["--budget", "samples"]),
}
WRITTEN = 16  # texts, of a window's length
STEPS = 32  # training steps of each kind; unrolling draws another number of iterations for each


def quality(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (methods, more) in COMPARISONS.items():
        folder = Path(arguments.output_dir) / name
        words = ["--methods", ",".join(methods), *more, "--seeds", str(arguments.seeds), "--seed", str(arguments.seed)]
        if code := dblocks(["compare", RECIPE, *words, "--jobs", str(arguments.jobs), "--output-dir", str(folder)]):
            raise SystemExit(code)
        runs = {}
        for path in sorted(folder.glob("*/seed-*/summary.json")):
            summary = json.loads(path.read_text())
            metrics = {
                name: [round(number, 5) for number in (metric["value"], metric["stderr"] or 0.0)]
                for name, metric in summary["metrics"].items()
                if name.startswith(("nats_", "entropy", "distinct_2", "loss_", "scrambled_"))
            }
            losses = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
            runs[f"{path.parts[-3]} {path.parts[-2]}"] = {
                "metrics": metrics,
                "wall_seconds": summary["wall_seconds"],
                "layer_evaluations": summary["layer_evaluations"],
                "steps": summary["block_steps"],
                "validation": [
                    [line["block_steps"], *line["validation"]["nats_per_token"].values()]
                    for line in losses
                    if "validation" in line
                ],
            }
        results = json.loads((folder / "compare.json").read_text())["results"]
        found[name] = {"command": f"dblocks compare {RECIPE} " + " ".join(words), "results": results, "runs": runs}
    return found


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """New networks: what a step costs does not depend on the weights."""
    torch.set_num_threads(1)
    methods = ("end-to-end", "checkpointing", "shallow", "diffusionblocks")
    runs = {method: prepare(load_recipe(RECIPE, [("method", method)])) for method in methods}
    batch = next(iter(runs["end-to-end"].trainer.stream.load([0])))
    seconds = alternating(
        {name: (lambda run=run: run.trainer.block_step(0, dict(batch))) for name, run in runs.items()}, STEPS
    )
    passed = {
        name: run.trainer.progress.layer_evaluations / (STEPS + 1) / len(batch["input_ids"])
        for name, run in runs.items()
    }
    whole = sum(seconds["end-to-end"])
    return {
        name: {
            "layer_evaluations_per_token": passed[name],
            "layer_evaluations_saved": passed["end-to-end"] / passed[name],
            "tokens_per_second": batch["input_ids"].numel() / statistics.fmean(own),
            "end_to_end_seconds_over_its_own": {
                "value": whole / sum(own),  # of means, as its iterations differ from step to step
                "stderr": ratio(seconds["end-to-end"], own)["stderr"],
            },
        }
        for name, own in seconds.items()
    }


def writing(arguments: argparse.Namespace) -> dict[str, Any]:
    """Iterations and layer applications of a token, and tokens per second, for some K and tolerances of early exit."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for method in ("end-to-end", "diffusionblocks"):
        run = load_run(
            Path(arguments.output_dir) / "layer-evaluations" / method / f"seed-{arguments.seed}", with_data=False
        )
        for iterations, early_exit in ((1, 0.0), (4, 0.0), (16, 0.0), (16, 0.001), (16, 0.01), (16, 0.1)):
            made = sample(run, Asked(num=WRITTEN), {"iterations": iterations, "early_exit": early_exit}).found
            names = ("iterations_per_token", "layer_evaluations_per_text", "tokens_per_second")
            texts = [list(text.encode("utf-8", "replace")) for text in made["texts"]]
            found[f"{method}, K = {iterations}, early exit {early_exit}"] = {
                **{name: made[name] for name in names},
                "entropy": statistics.fmean(entropy(text) for text in texts),
                "distinct_2": statistics.fmean(distinct_2(text) for text in texts),
            }
    return found


PARTS = {"quality": quality, "speed": speed, "writing": writing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1, help="the first (settings were chosen with 0)")
    parser.add_argument("--output-dir", default="runs/looped")
    arguments = parser.parse_args()
    found = PARTS[arguments.part](arguments)
    target = RESULTS / f"looped-{arguments.part}.json"
    target.write_text(json.dumps({"environment": describe(), **found}, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()

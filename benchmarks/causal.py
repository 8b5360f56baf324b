"""Next-token blocks on lm-stdlib: quality at equal layer evaluations and at equal samples, speed of training and
writing.

    python benchmarks/causal.py quality --jobs 2     every method, three seeds
    python benchmarks/causal.py speed                tokens per second of training and of writing, alternating, one
                                                     thread

Each part writes benchmarks/results/causal-PART.json. Finished runs below --output-dir are reused.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from diffusionblocks.cli import main as dblocks
from diffusionblocks.experiments.run import prepare
from diffusionblocks.recipes import load_recipe
from environment import describe
from timing import alternating, compared

RESULTS = Path(__file__).parent / "results"
RECIPE = "lm-stdlib"
DENOISERS = [f"diffusionblocks-{preset}" for preset in ("features", "information", "paper")]
COMPARISONS = {  # methods, and what else; in both budgets end-to-end and features make the same steps
    "layer-evaluations": (["end-to-end", "shallow", *DENOISERS], []),
    "samples": (["shallow"], ["--budget", "samples"]),
}
WRITTEN = 32  # texts written together
NAMES = ("nats_per_token", "perplexity", "bits_per_byte", "entropy", "entropy_real", "distinct_2", "distinct_2_real")
NAMES += ("repetition_4", "repetition_4_real")


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
                if name in NAMES or "_block_" in name
            }
            runs[f"{path.parts[-3]} {path.parts[-2]}"] = {"metrics": metrics, "wall_seconds": summary["wall_seconds"]}
        results = json.loads((folder / "compare.json").read_text())["results"]
        found[name] = {"command": f"dblocks compare {RECIPE} " + " ".join(words), "results": results, "runs": runs}
    return found


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """New networks: what a step costs does not depend on the weights."""
    torch.set_num_threads(1)
    same = [("train.residency", "device")]
    runs = {method: prepare(load_recipe(RECIPE, [("method", method), *same])) for method in ("end-to-end", *DENOISERS)}
    runs["features, head of one layer"] = prepare(load_recipe(RECIPE, [("blocks.head_layers", 1), *same]))
    batch = next(iter(runs["end-to-end"].trainer.stream.load([0])))

    def round_of_steps(run: Any) -> None:
        """One step of every block, with its update; in features context each goes on from the one before."""
        handed: Any = ()
        for block in range(run.model.num_blocks):
            handed = run.trainer.block_step(block, batch, handed).handed

    training = alternating({name: (lambda run=run: round_of_steps(run)) for name, run in runs.items()})
    start = torch.zeros(WRITTEN, 1, dtype=torch.long)
    for run in runs.values():
        run.model.eval()
    length = runs["end-to-end"].recipe.data.length
    writing = alternating(
        {name: (lambda run=run: run.recipe.task.go_on(run.trained, start, length)) for name, run in runs.items()}, 4
    )
    return {
        "training": compared(training, batch["input_ids"].numel(), "end-to-end"),
        "writing": compared(writing, WRITTEN * (length - 1), "end-to-end"),
    }


PARTS = {"quality": quality, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1, help="the first (settings were chosen with 0)")
    parser.add_argument("--output-dir", default="runs/causal")
    arguments = parser.parse_args()
    found = PARTS[arguments.part](arguments)
    target = RESULTS / f"causal-{arguments.part}.json"
    target.write_text(json.dumps({"environment": describe(), **found}, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()

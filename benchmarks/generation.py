"""Image generation on dit-mnist: quality at equal layer evaluations, the number of blocks, borders, and sampling time.

    python benchmarks/generation.py quality --jobs 2     every method, three seeds, with curves over compute
    python benchmarks/generation.py blocks --jobs 2      B = 1, 2, 3, 4, 6 and uniform borders, one seed, a third of the
                                                         budget
    python benchmarks/generation.py sampling             wall time per image, alternating, from the runs of `quality`

Each part writes benchmarks/results/generation-PART.json. Finished runs below --output-dir are reused.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusionblocks.cli import main as dblocks
from diffusionblocks.experiments.run import load_run
from environment import describe

RESULTS = Path(__file__).parent / "results"
METHODS = "end-to-end,shallow,diffusionblocks"
SPLITS = [("2", "equal-mass"), ("3", "equal-mass"), ("4", "equal-mass"), ("6", "equal-mass"), ("3", "uniform")]
SHORT = ["--seed", "6", "--steps", "1000", "--evaluation.num-samples", "2000"]


def curve(folder: Path, metric: str = "validation_loss") -> list[list[float]]:
    """[share of the run's layer evaluations, a metric] of a run, on its validation split."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    total = json.loads((folder / "summary.json").read_text())["layer_evaluations"]
    steps, spent = zip(
        *[(x["block_steps"], x["layer_evaluations"]) for x in lines if "layer_evaluations" in x], strict=True
    )
    return [
        [
            round(float(np.interp(line["block_steps"], steps, spent)) / total, 4),
            round(line["validation"][metric]["value"], 5),
        ]
        for line in lines
        if "validation" in line
    ]


def compare(words: list[str], folder: Path) -> dict[str, Any]:
    if code := dblocks(["compare", "dit-mnist", *words, "--output-dir", str(folder)]):
        raise SystemExit(code)
    return {
        "command": "dblocks compare dit-mnist " + " ".join(words),
        "results": json.loads((folder / "compare.json").read_text())["results"],
    }


def quality(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = Path(arguments.output_dir) / "quality"
    words = ["--methods", arguments.methods, "--seeds", str(arguments.seeds), "--jobs", str(arguments.jobs)]
    words += ["--seed", str(arguments.seed)]
    found = compare([*words, "--train.evaluate-every", "500"], folder)
    runs = sorted(folder.glob("*/seed-*/summary.json"))
    found["runs"] = {
        f"{path.parts[-3]} {path.parts[-2]}": {
            "metrics": json.loads(path.read_text())["metrics"],
            "wall_seconds": json.loads(path.read_text())["wall_seconds"],
            "curve": curve(path.parent),
        }
        for path in runs
    }
    return found


def blocks(arguments: argparse.Namespace) -> dict[str, Any]:
    """One comparison per split: methods differ in what depends on B."""
    rows = []
    for count, borders in SPLITS:
        folder = Path(arguments.output_dir) / f"blocks-{count}-{borders}"
        methods = "shallow,diffusionblocks" if borders == "equal-mass" else "diffusionblocks"
        words = ["--methods", methods, "--num-blocks", count, "--noise.borders", borders, *SHORT]
        found = compare([*words, "--jobs", str(arguments.jobs)], folder)
        rows += [{**result, "borders": borders, "split": int(count)} for result in found["results"]]
    folder = Path(arguments.output_dir) / "blocks-1"
    found = compare(["--methods", "end-to-end", *SHORT, "--jobs", str(arguments.jobs)], folder)
    return {"results": [{**found["results"][0], "borders": "", "split": 1}, *rows]}


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds per image of each method's first run, in turns, so that a slow moment hits all alike."""
    torch.set_num_threads(1)
    folder = Path(arguments.output_dir) / "quality"
    runs = {
        name: load_run(folder / name / f"seed-{arguments.seed}")
        for name in METHODS.split(",")
        if (folder / name).is_dir()
    }
    task = runs["end-to-end"].recipe.task
    labels, times = torch.arange(100) % 10, {name: [] for name in runs}
    for turn in range(6):
        for name, run in runs.items():
            with run.trainer.averaged():
                seconds = task.generate(run.trained, labels, seed=turn, quiet=True).seconds
            if turn:  # the first is a warm-up
                times[name].append(seconds / len(labels))
    ratios = {
        name: [own / whole for own, whole in zip(found, times["end-to-end"], strict=True)]
        for name, found in times.items()
    }
    return {
        "images": len(labels),
        "sampler": f"{task.sampler}, {task.sampling_steps} steps",
        "seconds_per_image": {name: statistics.median(found) for name, found in times.items()},
        "of_end_to_end": {
            name: {"value": statistics.fmean(found), "stderr": statistics.stdev(found) / len(found) ** 0.5}
            for name, found in ratios.items()
        },
    }


PARTS = {"quality": quality, "blocks": blocks, "sampling": sampling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=3, help="the first (0 to 2 were used while settings were chosen)")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--output-dir", default="runs/generation")
    arguments = parser.parse_args()
    found = PARTS[arguments.part](arguments)
    target = RESULTS / f"generation-{arguments.part}.json"
    target.write_text(json.dumps({"environment": describe(), **found}, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()

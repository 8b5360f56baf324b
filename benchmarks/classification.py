"""Accuracy of every method at equal layer evaluations and at equal samples, three seeds.

    python benchmarks/classification.py digits --jobs 2
    python benchmarks/classification.py mnist --jobs 2

Writes benchmarks/results/classification-RECIPE.json. Finished runs below --output-dir are reused.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from diffusionblocks.cli import main as dblocks
from environment import describe

METHODS = "end-to-end,shallow,diffusionblocks,diffusionblocks-paper"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", choices=("digits", "mnist"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output-dir", default="runs/benchmark")
    arguments = parser.parse_args()
    tables = {}
    for budget in ("layer-evaluations", "samples"):
        folder = Path(arguments.output_dir) / f"{arguments.recipe}-{budget}"
        if budget == "samples":  # the end-to-end runs of both budgets are the same
            first = Path(arguments.output_dir) / f"{arguments.recipe}-layer-evaluations" / "end-to-end"
            shutil.copytree(first, folder / "end-to-end", dirs_exist_ok=True)
        command = ["compare", arguments.recipe, "--methods", METHODS, "--seeds", str(arguments.seeds)]
        command += ["--budget", budget, "--jobs", str(arguments.jobs), "--output-dir", str(folder)]
        if code := dblocks(command):
            raise SystemExit(code)
        tables[budget] = {
            "command": "dblocks " + " ".join(command[:-2]),
            "results": json.loads((folder / "compare.json").read_text())["results"],
            "runs": [json.loads(path.read_text())["metrics"] for path in sorted(folder.glob("*/seed-*/summary.json"))],
        }
    target = Path(__file__).parent / "results" / f"classification-{arguments.recipe}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"environment": describe(), "budgets": tables}, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()

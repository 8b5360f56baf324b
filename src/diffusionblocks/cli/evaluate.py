"""`dblocks evaluate`: a trained run on its test split, or on tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusionblocks.cli.command import Command, add_run, add_trust, overrides, print_metrics, whole_number
from diffusionblocks.errors import UserError
from diffusionblocks.options import Range, check_value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_trust(parser)
    parser.add_argument("--harness", metavar="TASK,...", help="tasks of lm-evaluation-harness instead")
    parser.add_argument("--harness-path", metavar="FOLDER", help="with more tasks, as YAML files on local data")
    parser.add_argument("--harness-limit", type=whole_number, metavar="N", help="examples per task (default: all)")


def run(arguments: argparse.Namespace, rest: list[str]) -> Any:
    from diffusionblocks.experiments.evaluate import evaluate, evaluate_with_harness

    folder, settings = Path(arguments.run_dir), overrides(rest)
    check_value("--harness-limit", arguments.harness_limit, int | None, Range(least=1))
    if not arguments.harness and (arguments.harness_limit is not None or arguments.harness_path is not None):
        raise UserError(
            "--harness-limit and --harness-path are for tasks of the harness: name them with --harness TASK,..."
        )
    if arguments.harness:
        tasks = [name.strip() for name in arguments.harness.split(",") if name.strip()]
        where, limit = arguments.harness_path, arguments.harness_limit
        found = evaluate_with_harness(folder, tasks, settings, path=where, limit=limit)
        if not arguments.json:
            for task, metrics in found.items():
                print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        return {"harness": found}
    summary = evaluate(folder, settings)
    if not arguments.json:
        print_metrics(summary)
    return summary


COMMAND = Command(help="evaluate a trained run on its test split", arguments=add_arguments, run=run)

"""`dblocks compare`: several methods on one recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusionblocks.cli.command import Command, add_comparison, add_recipe, add_training, add_trust, recipe_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_training(parser)
    add_trust(parser)
    parser.add_argument("--methods", default="end-to-end,shallow,diffusionblocks", help="separated by commas")
    add_comparison(parser)


def run(arguments: argparse.Namespace, rest: list[str]) -> Any:
    from diffusionblocks.experiments.compare import compare, default_output, pairs
    from diffusionblocks.report import table
    from diffusionblocks.report.page import write_report

    recipe = recipe_of(arguments, rest)
    methods = [name.strip() for name in arguments.methods.split(",") if name.strip()]
    folder = Path(arguments.output_dir) if arguments.output_dir else default_output(recipe, "compare")
    results = compare(recipe, methods, folder, seeds=arguments.seeds, budget=arguments.budget, jobs=arguments.jobs)
    found = {"results": results, "pairs": pairs(results)}
    page = write_report([folder], folder / "report.html")
    if not arguments.json:
        table.show(results)
        print(f"report: {page}")
    return found


COMMAND = Command(
    help="train several methods on one recipe and print one table", arguments=add_arguments, run=run, settings=True
)

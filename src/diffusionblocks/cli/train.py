"""`dblocks train`: one recipe, one method."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusionblocks.cli.command import (
    Command,
    add_recipe,
    add_resume,
    add_training,
    add_trust,
    print_metrics,
    recipe_of,
)
from diffusionblocks.errors import OutOfMemory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_training(parser)
    add_trust(parser)
    add_resume(parser)


def run(arguments: argparse.Namespace, rest: list[str]) -> Any:
    import torch

    from diffusionblocks.experiments.compare import default_output
    from diffusionblocks.experiments.train import train

    recipe = recipe_of(arguments, rest)
    folder = Path(arguments.output_dir) if arguments.output_dir else default_output(recipe, "train")
    try:
        summary = train(recipe, folder, resume=arguments.resume == "auto")
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(too_large(recipe, arguments.recipe)) from error
    if not arguments.json:
        print_metrics(summary)
        result = summary.get("result", {})
        if recipe.model.pretrained and not result.get("needs_diffusionblocks", True):
            where = folder / result["folder"] if result["format"] != "as it came" else result["folder"]
            print(f"result ({result['format']}): {where}")
        print(f"run folder: {folder}")
    return summary


def too_large(recipe: Any, name: str) -> str:
    """What to say when the recipe called `name` did not fit the device: what it took there, and what would fit."""
    import torch

    from diffusionblocks.planning.plan import explain

    observed, limit = 0.0, 0.0
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        observed, ours = torch.cuda.max_memory_allocated(), free + torch.cuda.memory_reserved()
        limit = min(ours, total * torch.cuda.get_per_process_memory_fraction())  # the rest is not ours
        torch.cuda.empty_cache()
    return explain(recipe, name, observed, limit)


COMMAND = Command(
    help="train a recipe; the same command again resumes it", arguments=add_arguments, run=run, settings=True
)

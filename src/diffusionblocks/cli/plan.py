"""`dblocks plan`: the memory of every method before anything is trained, and what fits a card."""

from __future__ import annotations

import argparse
from typing import Any

from diffusionblocks.cli.command import WHOLE, Command, add_preset, add_recipe, add_trust, overrides
from diffusionblocks.errors import UserError
from diffusionblocks.options import Range, check_value, shown
from diffusionblocks.system.interruption import ended_at_once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, nargs="?")
    add_trust(parser)
    parser.add_argument("--model", metavar="NAME_OR_PATH", help="a Hugging Face model instead of a recipe")
    parser.add_argument("--memory", metavar="SIZE", help="the card's memory, such as 16GiB (default: the GPU here)")
    parser.add_argument("--num-blocks", metavar="B,B,...", help="numbers of blocks (default: some divisors)")
    add_preset(parser)


def run(arguments: argparse.Namespace, rest: list[str]) -> Any:
    from diffusionblocks.planning.plan import default_counts, plan
    from diffusionblocks.planning.units import parse_memory
    from diffusionblocks.planning.workload import for_model, from_recipe
    from diffusionblocks.recipes import load_recipe
    from diffusionblocks.report import table

    memory, free = parse_memory(arguments.memory) if arguments.memory else None, None
    if bool(arguments.recipe) == bool(arguments.model):
        raise UserError("plan needs a recipe or --model NAME_OR_PATH (one of the two)")
    settings = overrides(rest)
    if arguments.model:
        work, train = for_model(arguments.model, settings)
    else:
        if arguments.preset:
            settings.append(("preset", arguments.preset))
        recipe = load_recipe(arguments.recipe, settings, trust_remote_code=arguments.trust_remote_code)
        recipe.train.check()
        work, train = from_recipe(recipe, arguments.recipe, settings), recipe.train
    default = default_counts(work.num_layers) if work.recipe.task.splits else [1]
    counts = _numbers(arguments.num_blocks) if arguments.num_blocks else default
    if memory is None:
        memory, free = card(train.device)
    with ended_at_once():
        found = plan(work, counts, memory, train.batch_size, free)
    if not arguments.json:
        table.show_plan(found)
    return found


def card(device: str) -> tuple[int | None, int | None]:
    """Memory of the card that training would use here, and what is free of it now; None twice where it would not use
    one."""
    import torch

    from diffusionblocks.planning.card import target_device

    if target_device(device) != "cuda" or not torch.cuda.is_available():
        return None, None
    try:
        free, total = torch.cuda.mem_get_info(None if device == "auto" else device)
    except RuntimeError as error:  # not even a context fits beside what other processes hold
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the card cannot be asked what is free ({reason}); say what to plan for: --memory 16GiB"
        ) from None
    return total, free


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(WHOLE.fullmatch(part) for part in parts):
        raise UserError(f"--num-blocks takes numbers separated by commas, such as 2,3,4; got {shown(text)}")
    for part in parts:
        check_value("--num-blocks", int(part), int, Range(least=1))
    return list(dict.fromkeys(map(int, parts)))


COMMAND = Command(help="predict the memory of every method, and what fits a card", arguments=add_arguments, run=run)

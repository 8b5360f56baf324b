"""`dblocks adapt`: the recipe adapt with its most important setting as an argument; several methods are compared."""

from __future__ import annotations

import argparse
from typing import Any

from diffusionblocks.cli import compare, train
from diffusionblocks.cli.command import Command, add_comparison, add_resume, add_training, add_trust, overrides
from diffusionblocks.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hugging Face name, folder, .gguf file or package:NAME")
    add_training(parser)
    add_trust(parser)
    add_resume(parser)
    parser.add_argument("--methods", help="compare these, separated by commas, instead of training one")
    add_comparison(parser)


def run(arguments: argparse.Namespace, rest: list[str]) -> Any:
    arguments.recipe = "adapt"
    if not any(key in ("data.path", "data.source") for key, _ in overrides(rest)):
        raise UserError("adapt needs your data: --data.path FOLDER, FILE, .jsonl or .parquet")
    rest = [f"--model.pretrained={arguments.model}", *rest]
    return train.run(arguments, rest) if arguments.methods is None else compare.run(arguments, rest)


COMMAND = Command(
    help="adapt a pretrained language model to your text, code or conversations (the recipe adapt)",
    arguments=add_arguments,
    run=run,
    settings=True,
)

"""`dblocks export`: a trained run as an ordinary model, or one block's weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusionblocks.cli.command import Command, add_output, add_run, add_trust, overrides, whole_number
from diffusionblocks.options import Range, check_value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_trust(parser)
    parser.add_argument("--block", type=whole_number, help="only the weights of this block, as safetensors")
    add_output(parser)


def run(arguments: argparse.Namespace, rest: list[str]) -> Any:
    from diffusionblocks.experiments.export import export_block, export_network

    output = Path(arguments.output) if arguments.output else None
    check_value("--block", arguments.block, int | None, Range(least=0))
    if arguments.block is None:
        path = export_network(Path(arguments.run_dir), output, overrides(rest))
        if not arguments.json:
            print(f"Hugging Face model: {path}")
        return {"output": str(path)}
    path = export_block(Path(arguments.run_dir), arguments.block, output, overrides(rest))
    if not arguments.json:
        print(f"block {arguments.block}: {path}")
    return {"block": arguments.block, "output": str(path)}


COMMAND = Command(
    help="write a trained run as an ordinary Hugging Face model, or the weights of one block",
    arguments=add_arguments,
    run=run,
)

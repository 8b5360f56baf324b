"""`dblocks recipes`: what there is to train."""

from __future__ import annotations

import argparse
from typing import Any

from diffusionblocks.cli.command import Command, none


def run(arguments: argparse.Namespace, rest: list[str]) -> Any:
    from diffusionblocks.recipes import built_in

    none(rest)
    found = built_in()
    if not arguments.json:
        width = max(map(len, found))
        print("\n".join(f"{name.ljust(width)}  {description}" for name, description in found.items()))
    return {"recipes": found}


COMMAND = Command(help="list built-in recipes", arguments=lambda parser: None, run=run)

"""What every command is made of: its declaration, the arguments that several have, and settings as they are typed."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusionblocks.errors import UserError
from diffusionblocks.options import shown


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of `dblocks`.

    Args:
        help: its line in `dblocks --help`. arguments: adds its arguments to a parser.
        run: does it, from the arguments and from what the parser does not know; prints unless --json was given, and
            returns what --json prints.
        settings: whether its --help names the settings of a recipe.
    """

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, list[str]], Any]
    settings: bool = False


# ---------------------------------------------------------------- arguments that several commands have


def add_recipe(parser: argparse.ArgumentParser, **options: Any) -> None:
    parser.add_argument("recipe", metavar="RECIPE_OR_YAML", help="a built-in recipe or a YAML file", **options)


def add_preset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset", help="a preset: paper (next-token models: information, features), or one of the recipe"
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-dir", metavar="DIR", help="run folder (default: below runs/)")
    add_preset(parser)


def add_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", choices=("auto", "never"), default="auto", help="never: start over")


def add_comparison(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=whole_number, default=1, help="how many seeds (default 1)")
    parser.add_argument("--budget", default="layer-evaluations", help="equal 'layer-evaluations' or 'samples'")
    parser.add_argument("--jobs", type=whole_number, default=1, help="runs at once; they share the CPU cores")


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the folder of a trained run")


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="FILE", help="where the result is written")


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that a model or tokenizer brings (read it first)",
    )
    parser.add_argument(
        "--trust-inception",
        action="store_true",
        help="run the TorchScript file of evaluation.inception, which is code",
    )


WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,18})")  # int() also takes 012, 1_000 and digits of other scripts


def whole_number(text: str) -> int:
    """The type of an argument."""
    if not WHOLE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"it must be a whole number, got {shown(text)}")
    return int(text)


def number(text: str) -> float:
    """The type of an argument."""
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"it must be a finite number, got {shown(text)}")
    return value


# ---------------------------------------------------------------- settings


def overrides(tokens: list[str]) -> list[tuple[str, Any]]:
    """--key.sub value, --key.sub=value and bare --flag -> (key.sub, value), values read as YAML where they are not
    text."""
    from diffusionblocks.recipes.load import read_value

    pairs: list[tuple[str, Any]] = []
    index = 0
    while index < len(tokens):
        token = tokens[index]
        if not token.startswith("--"):
            raise UserError(f"unexpected argument {token!r}; settings are given as --key.sub value")
        key, equals, text = token[2:].partition("=")
        if not equals:
            if index + 1 < len(tokens) and not tokens[index + 1].startswith("--"):
                index += 1
                text = tokens[index]
            else:
                text = "true"
        key = key.replace("-", "_")
        pairs.append((key, read_value(key, text)))
        index += 1
    return pairs


def none(rest: list[str]) -> None:
    """Raises UserError where a command that takes no settings was given one."""
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}")


def recipe_of(arguments: argparse.Namespace, rest: list[str]) -> Any:
    """The recipe that a command names, with its preset and its settings."""
    from diffusionblocks.recipes import load_recipe

    settings = overrides(rest)
    if getattr(arguments, "preset", None):
        settings.append(("preset", arguments.preset))
    return load_recipe(arguments.recipe, settings, trust_remote_code=arguments.trust_remote_code)


def print_metrics(summary: dict[str, Any]) -> None:
    from diffusionblocks.report import table

    table.show([{**summary, "seeds": [summary["seed"]]}])

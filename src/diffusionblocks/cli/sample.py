"""The command `dblocks sample`: what a run makes, shown or written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusionblocks.errors import UserError
from diffusionblocks.options import Range, check_value

# Options that only some tasks take (`Task.sampling` says which).
OPTIONS = (
    *("class", "guidance", "grid", "prompt", "chat", "length", "temperature", "top_p", "top_k", "seed", "stop"),
    *("stream", "steps", "sampler", "iterations", "early_exit"),
)


def sample(arguments: argparse.Namespace, overrides: list[tuple[str, Any]]) -> Any:
    """What the run's task makes; prints it and returns what --json shows."""
    from diffusionblocks.experiments import sample as samples
    from diffusionblocks.experiments.run import load_run
    from diffusionblocks.training.task import Asked

    _check(arguments)
    folder = Path(arguments.run_dir)
    run = load_run(folder, overrides, with_data=False)
    sampling = samples.sampling_of(run)
    given = {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}
    samples.check_options(sampling, given)
    output = Path(arguments.output) if arguments.output else folder / sampling.file if sampling.file else None
    if output is not None:
        samples.check_file(sampling, output)
    asked = Asked(
        num=arguments.num,
        seed=arguments.seed or 0,
        classes=given.get("class", ""),
        prompt=arguments.prompt or "",
        chat=bool(arguments.chat),
        length=arguments.length or 0,
        stop=stop_strings(arguments.stop or []),
        stream=(lambda piece: print(piece, end="", flush=True)) if arguments.stream and not arguments.json else None,
    )
    settings = {field: given[name] for name, field in sampling.settings.items() if name in given}
    made = samples.sample(load_run(folder, overrides) if sampling.needs_data else run, asked, settings, output)
    if not arguments.json:
        print(f"{made.shown}: {output}" if sampling.file else made.shown)
        if made.aside:
            print(made.aside, file=sys.stderr)
    return made.found


LIMITS = {
    "num": Range(least=1, most=1_000_000),
    "guidance": Range(least=0),
    "steps": Range(least=1),
    "iterations": Range(least=1),
    "early_exit": Range(least=0),
    "length": Range(least=2),
    "temperature": Range(least=0),
    "top_p": Range(above=0, most=1),
    "top_k": Range(least=0),
    "seed": Range(),
}


def _check(arguments: argparse.Namespace) -> None:
    """Raises UserError for a number outside of its range, before a model is loaded."""
    for name, limits in LIMITS.items():
        check_value(f"--{name.replace('_', '-')}", getattr(arguments, name), float | None, limits)
    stop_strings(arguments.stop or [])
    if arguments.stream and arguments.num > 1:
        raise UserError(f"--stream writes one text; got --num {arguments.num}")
    try:
        (arguments.prompt or "").encode()
    except UnicodeEncodeError:
        raise UserError("--prompt holds bytes that are no UTF-8") from None


def stop_strings(texts: Sequence[str]) -> list[str]:
    """Strings that end a text, as they were meant: \\n is a line break. Raises UserError for an escape that means
    nothing."""
    found = []
    for text in texts:
        try:
            found.append(text.encode("latin-1", "backslashreplace").decode("unicode_escape"))
        except UnicodeDecodeError:
            raise UserError(
                f"--stop {text!r} has a backslash that begins no character: write \\\\ for a backslash"
            ) from None
        if not text:
            raise UserError("--stop is empty: every text would end before it began")
    return found

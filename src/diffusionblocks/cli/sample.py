"""The command `dblocks sample`: what a run makes, shown or written."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusionblocks.errors import UserError, nearest
from diffusionblocks.options import Range, check_value
from diffusionblocks.system.files import to_json, write_text

WRITING = ("prompt", "chat", "length", "temperature", "top_p", "top_k", "seed")
SAMPLING = ("class", "guidance", "grid", *WRITING, "stop", "stream", "steps", "sampler", "iterations", "early_exit")


def sample(arguments: argparse.Namespace, overrides: list[tuple[str, Any]]) -> Any:
    """Images, texts or classes, as the run's task says; prints them and returns what --json shows."""
    from diffusionblocks.blocks.causal import CausalBlocks
    from diffusionblocks.experiments.run import load_run
    from diffusionblocks.methods import find_method
    from diffusionblocks.tasks import CausalLM, ImageGeneration, MaskedLM, RecurrentLM

    folder = Path(arguments.run_dir)
    _check(arguments)
    run = load_run(folder, overrides, with_data=False)
    if find_method(run.recipe.method).adds_context:
        raise UserError(
            f"a run of the method {run.recipe.method} has no model of its own: its texts are in samples.json and "
            "report.html"
        )
    if isinstance(run.recipe.task, ImageGeneration):
        _only(arguments, "images", ("class", "guidance", "grid", "steps", "sampler", "seed"))
        return _sample_images(arguments, run)
    if isinstance(run.recipe.task, MaskedLM):
        _only(arguments, "text", (*WRITING, "steps", "sampler"))
        return _sample_texts(arguments, run)
    if isinstance(run.recipe.task, CausalLM):
        walks = isinstance(run.model, CausalBlocks) and not run.model.is_ordinary
        of_walks = ("steps", "sampler") if walks else ()
        _only(arguments, "text, one token after the other", (*WRITING, "stop", "stream", *of_walks))
        return _sample_texts(arguments, run)
    if isinstance(run.recipe.task, RecurrentLM):
        more: tuple[str, ...] = () if find_method(run.recipe.method).once else ("iterations", "early_exit")
        more += ("sampler",) if isinstance(run.model, CausalBlocks) else ()
        _only(arguments, "text, one token after the other", (*WRITING, "stop", "stream", *more))
        return _sample_texts(arguments, run)
    _only(arguments, "classes", ())
    return _sample_labels(arguments, load_run(folder, overrides))


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
    _stops(arguments.stop or [])
    if arguments.stream and arguments.num > 1:
        raise UserError(f"--stream writes one text; got --num {arguments.num}")
    try:
        (arguments.prompt or "").encode()
    except UnicodeEncodeError:
        raise UserError("--prompt holds bytes that are no UTF-8") from None


def _stops(texts: Sequence[str]) -> list[str]:
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


def _only(arguments: argparse.Namespace, makes: str, known: Sequence[str]) -> None:
    """Raises UserError for an option of sampling that has no meaning for what the run makes."""
    for name in SAMPLING:
        if name not in known and getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} has no meaning here: this run makes {makes}")


def _sample_texts(arguments: argparse.Namespace, run: Any) -> Any:
    from diffusionblocks.evaluation.text import sample_texts

    wanted = {"sampling_steps": arguments.steps, "sampler": arguments.sampler}
    wanted |= {"temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": arguments.top_k}
    wanted |= {"iterations": arguments.iterations, "early_exit": arguments.early_exit}
    settings = {name: value for name, value in wanted.items() if value is not None}
    found = sample_texts(
        run,
        arguments.num,
        prompt=arguments.prompt or "",
        chat=bool(arguments.chat),
        length=arguments.length or 0,
        seed=arguments.seed or 0,
        stop=_stops(arguments.stop or []),
        stream=(lambda piece: print(piece, end="", flush=True)) if arguments.stream and not arguments.json else None,
        **settings,
    )
    if arguments.output:
        write_text(Path(arguments.output), "\n".join(found["texts"]) + "\n")
        found["output"] = arguments.output
    if not arguments.json:
        between = "\n---\n" if any("\n" in text for text in found["texts"]) else "\n"
        print("" if arguments.stream else between.join(found["texts"]))
        steps = f", {found['steps']} steps" if "steps" in found else ""
        steps += (
            f", {found['iterations_per_token']:.3g} iterations per token" if "iterations_per_token" in found else ""
        )
        print(f"{found['tokens_per_second']:.0f} tokens/s{steps}", file=sys.stderr)
    return found


def _sample_images(arguments: argparse.Namespace, run: Any) -> Any:
    from diffusionblocks.evaluation.generation import sample_to_file

    output = Path(arguments.output) if arguments.output else Path(arguments.run_dir) / "samples.png"
    wanted = {"guidance": arguments.guidance, "sampling_steps": arguments.steps}
    wanted |= {"sampler": arguments.sampler, "grid": arguments.grid}
    settings = {name: value for name, value in wanted.items() if value is not None}
    chosen = getattr(arguments, "class")
    classes = _classes(chosen, run.data.classes) if chosen else []
    found = sample_to_file(run, arguments.num, output, classes=classes, seed=arguments.seed or 0, **settings)
    if not arguments.json:
        print(f"{found['num']} images in {found['seconds']:.1f} s: {found['output']}")
    return found


_NUMBER = re.compile(r"-?[0-9]{1,9}")


def _classes(text: str, names: Sequence[str]) -> list[int]:
    """`3`, `cat` or `3,cat` -> numbers of classes. A name that looks like a number is a number."""
    found = []
    for part in text.split(","):
        if _NUMBER.fullmatch(part.strip()):
            found.append(int(part))
        elif part.strip() in names:
            found.append(names.index(part.strip()))
        else:
            raise UserError(f"unknown class {part.strip()!r}{nearest(part.strip(), names)}")
    return found


def _sample_labels(arguments: argparse.Namespace, run: Any) -> Any:
    from diffusionblocks.experiments.predictions import predictions

    found = {"predictions": predictions(run, arguments.num)}
    if arguments.output:
        write_text(Path(arguments.output), to_json(found, indent=2) + "\n")
    if not arguments.json:
        for row in found["predictions"]:
            mark = "" if row["predicted"] == row["label"] else "  wrong"
            print(
                f"{row['index']:5d}  label {row['label']}  predicted {row['predicted']} "
                f"({row['probability']:.1%}){mark}"
            )
    return found

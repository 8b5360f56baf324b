"""The command line: `dblocks recipes | train | adapt | evaluate | sample | compare | plan | export | report`.

Exit codes: 0 done, 2 the input is wrong (one line says what and how to fix it), 1 anything else, 130 interrupted
(Ctrl-C), 143 terminated (SIGTERM).
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusionblocks import __version__
from diffusionblocks.errors import Failed, OutOfMemory, RunStopped, UserError, nearest
from diffusionblocks.options import Range, check_value, shown
from diffusionblocks.system.files import explained, to_json
from diffusionblocks.system.interruption import (
    Terminated,
    code_of,
    end_with_parent,
    ended_at_once,
    ignore,
    interruptible,
    only_commands_end,
)

log = logging.getLogger("diffusionblocks")


class _Parser(argparse.ArgumentParser):
    commands: dict[str, argparse.ArgumentParser]

    def error(self, message: str) -> Any:
        if "invalid choice" in message and "COMMAND" in message:
            name = message.split("invalid choice: ")[1].split(" (")[0].strip("'")
            message = f"unknown command {name!r}{nearest(name, COMMANDS)}"
        raise UserError(message)


def _recipe(arguments: argparse.Namespace, rest: list[str]) -> Any:
    from diffusionblocks.recipes import load_recipe

    overrides = _overrides(rest)
    if getattr(arguments, "preset", None):
        overrides.append(("preset", arguments.preset))
    return load_recipe(arguments.recipe, overrides, trust_remote_code=arguments.trust_remote_code)


def _overrides(tokens: list[str]) -> list[tuple[str, Any]]:
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


def _recipes(arguments: argparse.Namespace, rest: list[str]) -> Any:
    from diffusionblocks.recipes import built_in

    _none(rest)
    found = built_in()
    if not arguments.json:
        width = max(map(len, found))
        print("\n".join(f"{name.ljust(width)}  {description}" for name, description in found.items()))
    return {"recipes": found}


def _adapt(arguments: argparse.Namespace, rest: list[str]) -> Any:
    """The recipe adapt with its most important setting as an argument; several methods are compared."""
    arguments.recipe = "adapt"
    if not any(key in ("data.path", "data.source") for key, _ in _overrides(rest)):
        raise UserError("adapt needs your data: --data.path FOLDER, FILE, .jsonl or .parquet")
    rest = [f"--model.pretrained={arguments.model}", *rest]
    return _train(arguments, rest) if arguments.methods is None else _compare(arguments, rest)


def _train(arguments: argparse.Namespace, rest: list[str]) -> Any:
    import torch

    from diffusionblocks.experiments.compare import default_output
    from diffusionblocks.experiments.train import train

    recipe = _recipe(arguments, rest)
    folder = Path(arguments.output_dir) if arguments.output_dir else default_output(recipe, "train")
    try:
        summary = train(recipe, folder, resume=arguments.resume == "auto")
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(_too_large(recipe, arguments.recipe)) from error
    if not arguments.json:
        _print_metrics(summary)
        result = summary.get("result", {})
        if recipe.model.pretrained and not result.get("needs_diffusionblocks", True):
            where = folder / result["folder"] if result["format"] != "as it came" else result["folder"]
            print(f"result ({result['format']}): {where}")
        print(f"run folder: {folder}")
    return summary


def _too_large(recipe: Any, name: str) -> str:
    import torch

    from diffusionblocks.planning.plan import explain

    observed, limit = 0.0, 0.0
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        observed, ours = torch.cuda.max_memory_allocated(), free + torch.cuda.memory_reserved()
        limit = min(ours, total * torch.cuda.get_per_process_memory_fraction())  # the rest is not ours
        torch.cuda.empty_cache()
    return explain(recipe, name, observed, limit)


def _evaluate(arguments: argparse.Namespace, rest: list[str]) -> Any:
    from diffusionblocks.experiments.evaluate import evaluate, evaluate_with_harness

    folder, overrides = Path(arguments.run_dir), _overrides(rest)
    check_value("--harness-limit", arguments.harness_limit, int | None, Range(least=1))
    if not arguments.harness and (arguments.harness_limit is not None or arguments.harness_path is not None):
        raise UserError(
            "--harness-limit and --harness-path are for tasks of the harness: name them with --harness TASK,..."
        )
    if arguments.harness:
        tasks = [name.strip() for name in arguments.harness.split(",") if name.strip()]
        where, limit = arguments.harness_path, arguments.harness_limit
        found = evaluate_with_harness(folder, tasks, overrides, path=where, limit=limit)
        if not arguments.json:
            for task, metrics in found.items():
                print(f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        return {"harness": found}
    summary = evaluate(folder, overrides)
    if not arguments.json:
        _print_metrics(summary)
    return summary


def _sample(arguments: argparse.Namespace, rest: list[str]) -> Any:
    from diffusionblocks.cli.sample import sample

    return sample(arguments, _overrides(rest))


def _compare(arguments: argparse.Namespace, rest: list[str]) -> Any:
    from diffusionblocks.experiments.compare import compare, default_output, pairs
    from diffusionblocks.report import table
    from diffusionblocks.report.page import write_report

    recipe = _recipe(arguments, rest)
    methods = [name.strip() for name in arguments.methods.split(",") if name.strip()]
    folder = Path(arguments.output_dir) if arguments.output_dir else default_output(recipe, "compare")
    results = compare(recipe, methods, folder, seeds=arguments.seeds, budget=arguments.budget, jobs=arguments.jobs)
    found = {"results": results, "pairs": pairs(results)}
    page = write_report([folder], folder / "report.html")
    if not arguments.json:
        table.show(results)
        print(f"report: {page}")
    return found


def _plan(arguments: argparse.Namespace, rest: list[str]) -> Any:
    from diffusionblocks.planning.plan import default_counts, plan
    from diffusionblocks.planning.units import parse_memory
    from diffusionblocks.planning.workload import for_model, from_recipe
    from diffusionblocks.recipes import load_recipe
    from diffusionblocks.report import table

    memory, free = parse_memory(arguments.memory) if arguments.memory else None, None
    if bool(arguments.recipe) == bool(arguments.model):
        raise UserError("plan needs a recipe or --model NAME_OR_PATH (one of the two)")
    overrides = _overrides(rest)
    if arguments.model:
        work, train = for_model(arguments.model, overrides)
    else:
        if arguments.preset:
            overrides.append(("preset", arguments.preset))
        recipe = load_recipe(arguments.recipe, overrides, trust_remote_code=arguments.trust_remote_code)
        recipe.train.check()
        work, train = from_recipe(recipe, arguments.recipe, overrides), recipe.train
    default = default_counts(work.num_layers) if work.recipe.task.splits else [1]
    counts = _numbers(arguments.num_blocks) if arguments.num_blocks else default
    if memory is None:
        memory, free = _card(train.device)
    with ended_at_once():
        found = plan(work, counts, memory, train.batch_size, free)
    if not arguments.json:
        table.show_plan(found)
    return found


def _card(device: str) -> tuple[int | None, int | None]:
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
    if not all(_WHOLE.fullmatch(part) for part in parts):
        raise UserError(f"--num-blocks takes numbers separated by commas, such as 2,3,4; got {shown(text)}")
    for part in parts:
        check_value("--num-blocks", int(part), int, Range(least=1))
    return list(dict.fromkeys(map(int, parts)))


def _export(arguments: argparse.Namespace, rest: list[str]) -> Any:
    from diffusionblocks.experiments.export import export_block

    output = Path(arguments.output) if arguments.output else None
    check_value("--block", arguments.block, int | None, Range(least=0))
    if arguments.block is None:
        from diffusionblocks.experiments.export import export_network

        path = export_network(Path(arguments.run_dir), output, _overrides(rest))
        if not arguments.json:
            print(f"Hugging Face model: {path}")
        return {"output": str(path)}
    path = export_block(Path(arguments.run_dir), arguments.block, output, _overrides(rest))
    if not arguments.json:
        print(f"block {arguments.block}: {path}")
    return {"block": arguments.block, "output": str(path)}


def _report(arguments: argparse.Namespace, rest: list[str]) -> Any:
    from diffusionblocks.report.page import write_report

    _none(rest)
    folders = [Path(name) for name in arguments.run_dirs]
    page = write_report(folders, Path(arguments.output) if arguments.output else folders[0] / "report.html")
    if not arguments.json:
        print(f"report: {page}")
    return {"report": str(page)}


def _none(rest: list[str]) -> None:
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}")


def _print_metrics(summary: dict[str, Any]) -> None:
    from diffusionblocks.report import table

    table.show([{**summary, "seeds": [summary["seed"]]}])


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace, list[str]], Any], str]] = {
    "recipes": (_recipes, "list built-in recipes"),
    "train": (_train, "train a recipe; the same command again resumes it"),
    "adapt": (_adapt, "adapt a pretrained language model to your text, code or conversations (the recipe adapt)"),
    "evaluate": (_evaluate, "evaluate a trained run on its test split"),
    "sample": (_sample, "images or texts of a trained run, or predictions of a classifier"),
    "compare": (_compare, "train several methods on one recipe and print one table"),
    "plan": (_plan, "predict the memory of every method, and what fits a card"),
    "export": (_export, "write a trained run as an ordinary Hugging Face model, or the weights of one block"),
    "report": (_report, "one self-contained HTML page from run folders"),
}


_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,18})")  # int() also takes 012, 1_000 and digits of other scripts


def whole_number(text: str) -> int:
    """The type of an argument."""
    if not _WHOLE.fullmatch(text):
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


def _joined(argv: list[str], commands: dict[str, argparse.ArgumentParser]) -> list[str]:
    """Settings that the command's parser does not know, as --key=value: it would take their values for positional
    ones."""
    known = commands[argv[0]]._option_string_actions if argv[0] in commands else {}
    joined: list[str] = []
    takes = False
    for token in argv:
        if takes and not token.startswith("--"):
            joined[-1] += f"={token}"
            takes = False
            continue
        joined.append(token)
        takes = token.startswith("--") and "=" not in token and token not in known
    return joined


def _build_parser(settings: str) -> _Parser:
    parser = _Parser(prog="dblocks", description="Train deep networks block by block. See also: dblocks COMMAND --help")
    parser.add_argument("--version", action="version", version=f"dblocks {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    added: dict[str, argparse.ArgumentParser] = {}
    for name, (_, text) in COMMANDS.items():
        added[name] = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added[name].add_argument("--json", action="store_true", help="print exactly one JSON object on stdout")
    added["adapt"].add_argument("model", metavar="MODEL", help="Hugging Face name, folder, .gguf file or package:NAME")
    for name in ("train", "compare"):
        added[name].add_argument("recipe", metavar="RECIPE_OR_YAML", help="a built-in recipe or a YAML file")
    for name in ("train", "adapt", "compare"):
        added[name].add_argument("--output-dir", metavar="DIR", help="run folder (default: below runs/)")
        added[name].add_argument(
            "--preset", help="a preset: paper (next-token models: information, features), or one of the recipe"
        )
        added[name].formatter_class, added[name].epilog = argparse.RawDescriptionHelpFormatter, settings
    for name in ("train", "adapt", "compare", "plan", "evaluate", "sample", "export", "report"):
        added[name].add_argument(
            "--trust-remote-code",
            action="store_true",
            help="run Python code that a model or tokenizer brings (read it first)",
        )
        added[name].add_argument(
            "--trust-inception", action="store_true", help="run the TorchScript file of task.inception, which is code"
        )
    for name in ("train", "adapt"):
        added[name].add_argument("--resume", choices=("auto", "never"), default="auto", help="never: start over")
    added["compare"].add_argument("--methods", default="end-to-end,shallow,diffusionblocks", help="separated by commas")
    added["adapt"].add_argument("--methods", help="compare these, separated by commas, instead of training one")
    for name in ("adapt", "compare"):
        added[name].add_argument("--seeds", type=whole_number, default=1, help="how many seeds (default 1)")
        added[name].add_argument("--budget", default="layer-evaluations", help="equal 'layer-evaluations' or 'samples'")
        added[name].add_argument("--jobs", type=whole_number, default=1, help="runs at once; they share the CPU cores")
    added["plan"].add_argument("recipe", metavar="RECIPE_OR_YAML", nargs="?", help="a built-in recipe or a YAML file")
    added["plan"].add_argument("--model", metavar="NAME_OR_PATH", help="a Hugging Face model instead of a recipe")
    added["plan"].add_argument(
        "--memory", metavar="SIZE", help="the card's memory, such as 16GiB (default: the GPU here)"
    )
    added["plan"].add_argument("--num-blocks", metavar="B,B,...", help="numbers of blocks (default: some divisors)")
    added["plan"].add_argument(
        "--preset", help="a preset: paper (next-token models: information, features), or one of the recipe"
    )
    added["export"].add_argument("--block", type=whole_number, help="only the weights of this block, as safetensors")
    for name in ("evaluate", "sample", "export"):
        added[name].add_argument("run_dir", metavar="RUN_DIR")
    added["evaluate"].add_argument("--harness", metavar="TASK,...", help="tasks of lm-evaluation-harness instead")
    added["evaluate"].add_argument(
        "--harness-path", metavar="FOLDER", help="with more tasks, as YAML files on local data"
    )
    added["evaluate"].add_argument(
        "--harness-limit", type=whole_number, metavar="N", help="examples per task (default: all)"
    )
    sampling = added["sample"]
    sampling.add_argument(
        "--num", type=whole_number, default=16, help="how many images, texts or test samples (default 16)"
    )
    sampling.add_argument(
        "--class", metavar="CLASS,...", help="classes to generate, by number or name (default: all in turn)"
    )
    sampling.add_argument("--guidance", type=number, help="scale of classifier-free guidance (default: the recipe's)")
    sampling.add_argument("--steps", type=whole_number, help="sampling steps (default: the recipe's)")
    sampling.add_argument(
        "--sampler",
        help="images: euler, heun, dpm-solver++ or churn; text: ancestral or confidence (default: the recipe's)",
    )
    sampling.add_argument(
        "--iterations", type=whole_number, help="looped networks: iterations of the core (default: the recipe's)"
    )
    sampling.add_argument(
        "--early-exit",
        type=number,
        help="looped networks: stop iterating when a prediction changes by at most this (KL, nats)",
    )
    sampling.add_argument("--grid", help="rho or equal-mass (default: the recipe's)")
    sampling.add_argument("--prompt", help="text: what to go on from; {5} in it is a blank of 5 tokens to fill in")
    sampling.add_argument(
        "--chat",
        action="store_const",
        const=True,
        help="text: the prompt is a question, put in the model's chat template",
    )
    sampling.add_argument(
        "--length", type=whole_number, help="text: tokens in all (default: the window, or a prompt with blanks)"
    )
    sampling.add_argument("--temperature", type=number, help="text: 0 = the likeliest tokens (default: the recipe's)")
    sampling.add_argument(
        "--top-p", type=number, help="text: share of probability to draw from (default: the recipe's)"
    )
    sampling.add_argument(
        "--top-k", type=whole_number, help="text: draw from so many likeliest tokens (default: the recipe's)"
    )
    sampling.add_argument(
        "--stop", action="append", help="text: end before this string; \\n is a line break (may be given several times)"
    )
    sampling.add_argument(
        "--stream", action="store_const", const=True, help="text: print one text as it is written (--num 1)"
    )
    sampling.add_argument("--seed", type=whole_number, help="of the noise (default 0)")
    for name in ("sample", "report", "export"):
        added[name].add_argument("--output", metavar="FILE")
    added["report"].add_argument("run_dirs", metavar="RUN_DIR", nargs="+")
    parser.commands = added
    return parser


def _settings_help() -> str:
    """Every recipe key with its default, for --help."""
    from diffusionblocks.methods import METHODS
    from diffusionblocks.recipes import Recipe
    from diffusionblocks.recipes.load import SHORT_NAMES

    lines = ["settings (--key value), with their defaults where a recipe says nothing:"]
    for name, value in Recipe().as_dict().items():
        if name in ("presets", "methods", "name", "description", "preset"):
            continue
        for key, default in value.items() if isinstance(value, dict) else [("", value)]:
            lines.append(f"  --{f'{name}.{key}'.strip('.').replace('_', '-')} {default!r}")
    lines.append("short names: " + ", ".join("--" + name.replace("_", "-") for name in SHORT_NAMES))
    lines.append("methods:")
    lines += [f"  {name.ljust(22)} {method.description}" for name, method in METHODS.items()]
    return "\n".join(lines)


def _run(arguments: argparse.Namespace, rest: list[str]) -> Any:
    import torch

    from diffusionblocks.system.trust import trusting

    code, script = (getattr(arguments, name, False) for name in ("trust_remote_code", "trust_inception"))
    try:
        with trusting(remote_code=code, inception=script):
            return COMMANDS[arguments.command][0](arguments, rest)
    except torch.OutOfMemoryError as error:  # `train` says what would fit; here it is evaluation or sampling
        less = "Fewer samples at once (--num), a shorter --length or --device cpu need less"
        raise OutOfMemory(f"out of memory in {arguments.command}: {str(error).split('. ')[0]}. {less}") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        asked = re.search(r"allocate (\d+) bytes", str(error))
        size = f" ({int(asked.group(1)) / 2**30:,.1f} GiB at once)" if asked else ""
        raise OutOfMemory(
            f"out of host memory in {arguments.command}{size}: a smaller network, batch or --num needs less"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    log.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        with interruptible():
            end_with_parent()
            return _main(argv)
    except UserError as error:
        return _said(error, 2)
    except Failed as error:
        return _said(error, 1)
    except RunStopped as stopped:
        return _said(stopped, code_of(stopped.signal))
    except Terminated:
        return _said("terminated", code_of(signal.SIGTERM))
    except KeyboardInterrupt:
        return _said("interrupted", code_of(signal.SIGINT))
    except BrokenPipeError:
        return 1
    except SystemExit as finished:  # argparse, after --help or --version
        return int(finished.code or 0)
    except Exception as error:
        if (better := explained(error)) is None:
            raise
        return _said(better, 2 if isinstance(better, UserError) else 1)


def _main(argv: list[str]) -> int:
    wants_help = argv[:1] in (["train"], ["adapt"], ["compare"]) and {"-h", "--help"} & set(argv)
    parser = _build_parser(_settings_help() if wants_help else "")
    if not argv:
        parser.print_help()
        return 0
    arguments, rest = parser.parse_known_args(_joined(argv, parser.commands))
    result = _run(arguments, rest)
    if arguments.json:
        print(to_json(result))
    return 0


def _said(what: object, code: int) -> int:
    """Says in one line how the command ended."""
    print(f"dblocks: {' '.join(str(what).split())}", file=sys.stderr)
    return code


def program() -> None:
    """The command `dblocks`: nothing interrupts its last words."""
    only_commands_end()
    code = main()
    ignore()
    sys.exit(code)


if __name__ == "__main__":
    program()

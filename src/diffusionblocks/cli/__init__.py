"""The command line: `dblocks recipes | train | adapt | evaluate | sample | compare | plan | export | report`.

Each command is a file that declares it (command.py). Exit codes: 0 done, 2 the input is wrong (one line says what and
how to fix it), 1 anything else, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM).
"""

from __future__ import annotations

import argparse
import logging
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from diffusionblocks import __version__
from diffusionblocks.cli import (
    adapt,
    compare,
    evaluate,
    export,
    plan,
    recipes,
    report,
    sample_arguments,
    settings,
    train,
)
from diffusionblocks.cli.command import Command
from diffusionblocks.errors import Failed, OutOfMemory, RunStopped, UserError, nearest
from diffusionblocks.system.files import explained, to_json
from diffusionblocks.system.interruption import (
    Terminated,
    code_of,
    end_with_parent,
    ignore,
    interruptible,
    only_commands_end,
)

log = logging.getLogger("diffusionblocks")

COMMANDS: dict[str, Command] = {
    "recipes": recipes.COMMAND,
    "train": train.COMMAND,
    "adapt": adapt.COMMAND,
    "evaluate": evaluate.COMMAND,
    "sample": sample_arguments.COMMAND,
    "compare": compare.COMMAND,
    "plan": plan.COMMAND,
    "export": export.COMMAND,
    "report": report.COMMAND,
}


class _Parser(argparse.ArgumentParser):
    commands: dict[str, argparse.ArgumentParser]

    def error(self, message: str) -> Any:
        if "invalid choice" in message and "COMMAND" in message:
            name = message.split("invalid choice: ")[1].split(" (")[0].strip("'")
            message = f"unknown command {name!r}{nearest(name, COMMANDS)}"
        raise UserError(message)


def _build_parser() -> _Parser:
    parser = _Parser(prog="dblocks", description="Train deep networks block by block. See also: dblocks COMMAND --help")
    parser.add_argument("--version", action="version", version=f"dblocks {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    parser.commands = {}
    for name, command in COMMANDS.items():
        own = commands.add_parser(
            name, help=command.help, description=command.help, allow_abbrev=False, add_help=not command.settings
        )
        if command.settings:
            settings.add_help(own)
        own.add_argument("--json", action="store_true", help="print exactly one JSON object on stdout")
        command.arguments(own)
        parser.commands[name] = own
    return parser


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


def _run(arguments: argparse.Namespace, rest: list[str]) -> Any:
    import torch

    from diffusionblocks.system.trust import trusting

    code, script = (getattr(arguments, name, False) for name in ("trust_remote_code", "trust_inception"))
    try:
        with trusting(remote_code=code, inception=script):
            return COMMANDS[arguments.command].run(arguments, rest)
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
        return finished.code if isinstance(finished.code, int) else 0 if finished.code is None else 1
    except Exception as error:
        if (better := explained(error)) is None:
            raise
        return _said(better, 2 if isinstance(better, UserError) else 1)


def _main(argv: list[str]) -> int:
    parser = _build_parser()
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

"""`dblocks report`: one page from run folders."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusionblocks.cli.command import Command, add_output, add_trust, none


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", help="folders of runs and of comparisons")
    add_trust(parser)
    add_output(parser)


def run(arguments: argparse.Namespace, rest: list[str]) -> Any:
    from diffusionblocks.report.page import write_report

    none(rest)
    folders = [Path(name) for name in arguments.run_dirs]
    page = write_report(folders, Path(arguments.output) if arguments.output else folders[0] / "report.html")
    if not arguments.json:
        print(f"report: {page}")
    return {"report": str(page)}


COMMAND = Command(help="one self-contained HTML page from run folders", arguments=add_arguments, run=run)

"""The rooms of the package, in order, and what the code says of them.

    python docs/rooms.py            draws the diagram of docs/architecture.md anew, from the imports
    python docs/rooms.py --counts   prints the thermometer: what tends to grow where nobody owns a decision

A room imports from itself and from rooms before it in the list (tests/unit/test_structure.py).
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "src" / "diffusionblocks"
PAGE = Path(__file__).parent / "architecture.md"
BEGIN, END = "<!-- drawn by docs/rooms.py -->", "<!-- end of what docs/rooms.py draws -->"
ROOMS = {
    "": "errors, seeds, options, and the registry of declarations",
    "system": "files, folders, devices, signals, consent",
    "theory": "formulas on tensors",
    "networks": "what a foreign network is",
    "blocks": "a network in blocks",
    "data": "images, text, batches",
    "training": "one loop, one block at a time",
    "evaluation": "metrics",
    "tasks": "what is learned",
    "recipes": "what a user writes",
    "methods": "how it is trained",
    "planning": "memory and time before the run",
    "experiments": "a run folder and what is done with it",
    "report": "tables, figures, page",
    "cli": "one file per command",
}


def room_of(module: str, sources: Path = SOURCES) -> str:
    """Of `diffusionblocks.ROOM.FILE`; empty for what lies in no room."""
    first = [*module.split("."), ""][1]
    return first if (sources / first).is_dir() else ""


def imports(path: Path) -> Iterator[str]:
    """Full names of this package's modules (or of names in them) that a file imports, in either form."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}: a relative import hides which room it goes to")
            if (node.module or "").split(".")[0] == "diffusionblocks":
                yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "diffusionblocks")


def arrows(sources: Path = SOURCES) -> dict[str, set[str]]:
    """For every room, the rooms that it imports from, but for itself."""
    found: dict[str, set[str]] = {name: set() for name in ROOMS}
    for path in sources.rglob("*.py"):
        own = path.relative_to(sources).parts[0] if path.parent != sources else ""
        if path != sources / "__init__.py":
            found[own] |= {room_of(module, sources) for module in imports(path)} - {own}
    return found


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Without arrows that others imply: A -> C where A -> B -> C."""
    reach: dict[str, set[str]] = {}
    for name in ROOMS:  # in order, so what a room imports from is known
        reach[name] = graph[name].union(*(reach[other] for other in graph[name]))
    return {name: {to for to in tos if not any(to in reach[other] for other in tos)} for name, tos in graph.items()}


def diagram(sources: Path = SOURCES) -> str:
    """In Mermaid, which GitHub and most editors draw."""
    lines = ["```mermaid", "flowchart BT"]
    for name, what in ROOMS.items():
        folder = sources / name if name else sources
        files = [path for path in (folder.rglob("*.py") if name else folder.glob("*.py")) if path.stat().st_size]
        shown = name or "no room"
        lines.append(f'    {name or "root"}["<b>{shown}</b><br>{what}<br>{len(files)} files"]')
    for name, tos in reduced(arrows(sources)).items():
        lines += [f"    {name or 'root'} --> {to or 'root'}" for to in ROOMS if to in tos]
    return "\n".join([*lines, "```"])


def drawn(page: str) -> str:
    """The page with the diagram as the code is now."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{diagram()}\n\n{END}{rest.split(END)[1]}"


# ---------------------------------------------------------------- thermometer

MODELS = r"\w*(Blocks|Network|EndToEndModel|WholeDenoiser|BlockCoordinateModel|DiffusionBlocksModel)"
TASKS = r"(Classification|ImageGeneration|MaskedLM|CausalLM|RecurrentLM|NextToken)"
DATA = r"(TextConfig|DataConfig|TextSplits|ImageSplits|HuggingFace)"
METHODS = (
    *("end-to-end", "checkpointing", "shallow", "exact", "full", "lora", "last-block", "mixed"),
    *("diffusionblocks", "diffusionblocks-paper", "diffusionblocks-information", "diffusionblocks-features"),
    *("original", "prompt", "retrieval"),
)


def counts(sources: Path = SOURCES) -> dict[str, int]:
    """What tends to grow where nobody owns a decision."""
    paths = list(sources.rglob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in paths]
    checks = [check for text in texts for check in re.findall(r"isinstance\([^()]*(?:\([^()]*\))?[^()]*\)", text)]
    quoted = re.compile("|".join(f'"{name}"' for name in METHODS))
    functions = [
        node
        for text in texts
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return {
        "isinstance checks on kinds of model": sum(bool(re.search(rf"\b{MODELS}\b", check)) for check in checks),
        "isinstance checks on kinds of task": sum(bool(re.search(rf"\b{TASKS}\b", check)) for check in checks),
        "isinstance checks on kinds of data": sum(bool(re.search(rf"\b{DATA}\b", check)) for check in checks),
        "lines that quote a method's name": sum(
            bool(quoted.search(line)) for text in texts for line in text.splitlines()
        ),
        "arguments `run: Any`": sum(len(re.findall(r"\brun: Any\b", text)) for text in texts),
        "files of more than 400 lines": sum(len(text.splitlines()) > 400 for text in texts),
        "functions of more than 50 lines": sum((node.end_lineno or 0) - node.lineno >= 50 for node in functions),
        "files": len([text for text in texts if text]),
        "lines": sum(len(text.splitlines()) for text in texts),
    }


def main() -> None:
    if "--counts" in sys.argv:
        sources = Path(sys.argv[-1]) if len(sys.argv) > 2 else SOURCES
        for what, count in counts(sources).items():
            print(f"{count:6,}  {what}")
        return
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

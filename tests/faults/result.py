"""What `make faults` leaves: benchmarks/results/faults.json with the counts of every matrix, and docs/errors.md.

    python -m tests.faults.result FOLDER

reads the records that a full run wrote into FOLDER. Exit code 1 where a case failed.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.environment import describe

from tests.faults.harness import KINDS

ROOT = Path(__file__).parents[2]
MOST_ROWS = 150
HEAD = """# Errors and what they mean

What `dblocks` says to wrong input, damaged run folders, full disks and other processes, and the exit code. Written by
`make faults` from the cases in tests/faults, so that every line here is one that the program has printed. RUN, ADAPTED,
NET, TEXTS, DISK and HERE stand for folders; a line that is longer is cut.

Exit codes: 0 done; 2 the input is wrong; 1 anything else, such as a full disk; 130 after Ctrl-C; 143 after SIGTERM.
After every one of these the files that were there before are still there, and the same command may be given again.
"""
ORDER = (
    "commands", "recipes", "train", "places", "evaluate", "sample", "export", "compare", "plan", "adapt", "images",
    "text", "Damaged run folders", "Two processes", "Disks",
)  # fmt: skip


def records(folder: Path) -> list[dict[str, Any]]:
    """Every case of a run, once: of a test that was run again, the last."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        for line in path.read_text().splitlines():
            one = json.loads(line)
            found[one["case"]] = one
    return list(found.values())


def counts(found: list[dict[str, Any]]) -> dict[str, Any]:
    matrices: dict[str, Any] = {}
    for matrix in sorted({one["matrix"] for one in found}):
        own = [one for one in found if one["matrix"] == matrix]
        faults: Counter[str] = Counter()
        for one in own:
            faults.update(one["faults"])
        skipped = sorted({one["skipped"] for one in own if one["skipped"]})
        matrices[matrix] = {
            "cases": sum(one["cases"] for one in own if not one["skipped"]),
            **{kind.replace(" ", "_"): faults[kind] for kind in (*KINDS, "broken test")},
            "seconds": round(sum(one["seconds"] for one in own), 1),
            **({"skipped": sum(bool(one["skipped"]) for one in own), "why": skipped} if skipped else {}),
            "failed": [
                {"case": one["case"].partition("::")[2], "message": one["message"]} for one in own if one["faults"]
            ][:100],
        }
    return matrices


def page(found: list[dict[str, Any]]) -> str:
    """docs/errors.md: of messages that say the same of another option or value, the first."""
    rows = [one["row"] for one in found if one["row"] and not one["faults"]]
    lines, kinds = [HEAD], set[str]()
    for group in ORDER:
        table = []
        for row in sorted(
            (row for row in rows if row["group"] == group), key=lambda row: (row["what"], row["message"])
        ):
            kind = _kind(row["message"])
            if kind in kinds or len(kinds) >= MOST_ROWS:
                continue
            kinds.add(kind)
            message = row["message"] if len(row["message"]) <= 240 else row["message"][:240] + "…"
            table.append(f"| {_cell(row['what'])} | {_cell(message)} | {row['code']} |")
        if table:
            title = f"{group[0].upper()}{group[1:]}"
            lines += [f"## {title}\n", "| what was wrong | `dblocks:` | exit code |", "|---|---|---|", *table, ""]
    return "\n".join(lines)


def _kind(message: str) -> str:
    """A message without its values and the names of options, files and folders."""
    message = re.sub(r"'[^']*'|\"[^\"]*\"", "X", message)
    message = re.sub(r"--?[\w.-]+|\b\w+(\.\w+)+\b|[A-Z]*/\S+", "X", message)
    return re.sub(r"-?[\d.,]+(e[+-]?\d+)?|nan|inf", "N", message)[:60]


def _cell(text: str) -> str:
    shown = "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
    return shown.replace("|", "\\|").replace("<", "&lt;").replace("$", "\\$")


def main(folder: Path) -> int:
    found = records(folder)
    matrices = counts(found)
    totals = {
        kind: sum(own[kind] for own in matrices.values())
        for kind in ("cases", *(k.replace(" ", "_") for k in (*KINDS, "broken test")))
    }
    result = {"command": "make faults", **describe(), "totals": totals, "matrices": matrices}
    (ROOT / "benchmarks" / "results" / "faults.json").write_text(json.dumps(result, indent=1) + "\n")
    (ROOT / "docs" / "errors.md").write_text(page(found))
    for name, own in matrices.items():
        broken = {kind: own[kind] for kind in totals if kind != "cases" and own[kind]}
        print(f"{name}: {own['cases']} cases in {own['seconds']:.0f} s, {broken or 'no fault'}")
    return int(any(own["failed"] for own in matrices.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

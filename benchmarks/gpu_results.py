"""Results of benchmarks/gpu.py: one JSON per part, written row by row, and what all of them show together.

KEYS says what a file holds. Rows that could not run (`errors`) are tried again by the next run.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # torch reads either; the second is the old name
PACKAGES = ("torch", "transformers", "diffusers", "triton")
Row = dict[str, Any]
KEYS = {
    "part": "of gpu.PARTS",
    "dry_run": "tiny networks on the CPU: the figures mean nothing",
    "environment": "commit, versions, processor, card with its driver, capability and memory, torch's allocator",
    "finished": "every row was tried",
    "seconds": "of all runs of the part together; of a row: of a call of its contender (speed) or of its tests",
    "rows": "one per thing measured; `row` is its name",
    "errors": "rows that could not run: name and last lines",
    "not_run": "rows whose packages are not installed: name and packages",
    "row": "its name",
    "git_commit": "of a row that was measured again later",
    # speed
    "unit": "of per_second, tokens or images",
    "per_second": "samples that every weight is trained on",
    "of_plain": "speed as a multiple of the plain loop's: mean over turns and its standard error",
    "of_end_to_end": "as a multiple of end-to-end training's",
    "compiled_over_eager": "as a multiple of the same without compilation",
    "host_over_device": "time as a multiple of the same with residency device",
    # memory of a row, bytes; none on the CPU
    "peak_allocated": "torch.cuda.max_memory_allocated",
    "peak_reserved": "torch.cuda.max_memory_reserved",
    "reserved_over_allocated": "of the two (of `memory`: of reserved and measured)",
    # large
    "fits": "false: it ran out of memory",
    "parameters": "of the network",
    "seconds_per_round": "one step of every weight",
    "tokens_per_second": "in such rounds",
    "planned": "predicted peak, bytes",
    "error": "predicted over measured peak, less one",
    # memory: a row of benchmarks/memory.py
    "family": "of the network",
    "method": "of training",
    "num_blocks": "B",
    "truncation": "of backpropagation through a loop",
    "train": "settings that differ from the defaults",
    "blocks": "settings that differ from the defaults",
    "predicted": "bytes by kind (card: by method)",
    "measured": "peak bytes",
    "reserved": "peak bytes",
    # tests: a row is a file; passed, failed, skipped and not_reached are of all files too
    "collected": "tests of the file",
    "passed": "tests",
    "failed": "tests",
    "skipped": "tests",
    "not_reached": "tests for which there was no time",
    "failures": "names of failed tests and the last lines of their reports",
    # card: a row is a command
    "exit": "its exit code",
    "expected_exit": "the exit code that it should have",
    "text": "the last lines that it printed",
    "limit_bytes": "memory of the small card",
}


def environment() -> dict[str, Any]:
    """What a part runs on. Neither torch nor this package is imported: that takes seconds, and may start CUDA."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    found = {"git_commit": _line_of("git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD")}
    found |= {"versions": versions, "machine": platform.machine(), "cpu_count": os.cpu_count()}
    names = ("device", "driver", "capability", "device_memory")
    asked = "--query-gpu=name,driver_version,compute_cap,memory.total"
    card = _line_of("nvidia-smi", asked, "--format=csv,noheader") or "cpu"
    if chosen := {name: os.environ[name] for name in ALLOCATOR if name in os.environ}:
        found["allocator"] = chosen
    return {**found, **dict(zip_longest(names, card.split(", ")))}


def _line_of(*command: str) -> str | None:
    """The first line that a command prints, None where it cannot run."""
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return out.splitlines()[0].strip() if out.strip() else None


class Results:
    """The JSON of one part. Rows of an earlier run count if commit, packages, card and kind (dry or not) are alike."""

    def __init__(self, folder: Path, part: str, dry_run: bool) -> None:
        self.path, self._began = folder / f"gpu-{part}.json", time.monotonic()
        self.content: dict[str, Any] = {
            "part": part,
            "dry_run": dry_run,
            "environment": environment(),
            "finished": False,
        }
        self.content |= {"seconds": 0.0, "rows": [], "errors": [], "not_run": []}
        before = read(folder, part)
        if all(before.get(key) == self.content[key] for key in ("dry_run", "environment")):
            self.content |= {
                key: value for key, value in before.items() if key not in ("errors", "not_run", "finished")
            }
        elif before:
            print(f"{self.path.name} is of another commit or machine and is measured anew", flush=True)
        self._before = self.content["seconds"]

    @property
    def rows(self) -> list[Row]:
        return self.content["rows"]

    def has(self, name: str) -> bool:
        return any(row["row"] == name for row in self.rows)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(" ".join(f"{key}={_short(value)}" for key, value in row.items()), flush=True)
        self.write()

    def fail(self, name: str, error: str) -> None:
        last = "\n".join(error.strip().splitlines()[-6:])
        self.content["errors"].append({"row": name, "error": last})
        print(f"{name}: FAILED: {last}", flush=True)
        self.write()

    def skip(self, name: str, needs: str) -> None:
        self.content["not_run"].append({"row": name, "needs": needs})
        print(f"{name}: skipped, needs {needs}", flush=True)
        self.write()

    def finish(self) -> None:
        self.content["finished"] = True
        self.write()

    def write(self) -> None:
        """Whole or not at all: the part may be killed at any moment."""
        self.content["seconds"] = round(self._before + time.monotonic() - self._began, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(partial, self.path)


def read(folder: Path, part: str) -> dict[str, Any]:
    """A part's results, {} where there are none."""
    path = folder / f"gpu-{part}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "/".join(_short(item) for item in value.values())
    return str(value).strip().splitlines()[-1][:100] if value else str(value)


# ---------------------------------------------------------------- what must hold

AT_LEAST = (  # row of `speed`, ratio, bound
    *((f"llama {size}: end-to-end", "of_plain", 0.95) for size in ("large vocabulary", "small vocabulary")),
    *((f"llama {size}: features", "of_end_to_end", 0.75) for size in ("large vocabulary", "small vocabulary")),
    ("llama large vocabulary: information", "of_end_to_end", 0.75),
    ("masked: blocks", "of_end_to_end", 0.75),
    ("dit: blocks", "of_end_to_end", 0.75),
    ("vit: blocks", "of_end_to_end", 0.75),
    *(
        (f"llama {size}: features, compiled", "compiled_over_eager", 1.3)
        for size in ("large vocabulary", "small vocabulary")
    ),
)
HOST = "host_over_device"
Line = tuple[str, str, str]  # claim, figure, verdict


def must_hold(folder: Path) -> list[Line]:
    """Every line of what a card has to show, with its figure and whether it holds."""
    parts = {part: read(folder, part) for part in ("tests", "speed", "memory", "large", "card")}
    speed = {row["row"]: row for row in parts["speed"].get("rows", [])}
    found = []
    for name, ratio, bound in AT_LEAST:
        value = speed[name][ratio]["value"] if name in speed else None
        found.append(
            _line(f"{name}: {ratio.replace('_', ' ')} >= {bound}", value, value is not None and value >= bound)
        )
    hosted = [row for row in speed.values() if HOST in row]
    for row in hosted:
        value = row[HOST]["value"]
        found.append(_line(f"{row['row']}: host over device <= 1.15", value, value <= 1.15))
    if not hosted:
        found.append(_line("residency host over device <= 1.15", None, False))
    for part in ("speed", "memory", "large"):
        for claim, key, bound in (
            ("reserved over allocated", "reserved_over_allocated", 1.1),
            ("plan error", "error", 0.1),
        ):
            if (part, key) != ("speed", "error"):
                found.append(_worst(f"{part}: {claim} <= {bound}, worst row", parts[part].get("rows", []), key, bound))
    return [*found, _suite(parts["tests"]), _card(parts["card"])]


def _line(claim: str, value: float | None, holds: bool, more: str = "") -> Line:
    if value is None:
        return claim, "", "not measured"
    return claim, f"{value:.3f}{more}", "holds" if holds else "falls short"


def _worst(claim: str, rows: list[Row], key: str, bound: float) -> Line:
    measured = [row for row in rows if row.get(key) is not None]
    if not measured:
        return _line(claim, None, False)
    row = max(measured, key=lambda row: abs(row[key]))
    return _line(claim, row[key], abs(row[key]) <= bound, f" ({row['row']})")


def _suite(content: dict[str, Any]) -> Line:
    if "passed" not in content:
        return "the suite passes", "", "not measured"
    counts = {name: content[name] for name in ("passed", "failed", "skipped", "not_reached")}
    figure = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())
    if counts["failed"]:
        return "the suite passes", figure, "falls short"
    return "the suite passes", figure, "not measured" if counts["not_reached"] or not counts["passed"] else "holds"


def _card(content: dict[str, Any]) -> Line:
    claim = "a network that fails end to end trains by blocks"
    rows = content.get("rows", [])
    if not rows or not content.get("finished"):
        return claim, "", "not measured"
    figure = "exit codes " + ", ".join(str(row["exit"]) for row in rows)
    return claim, figure, "holds" if all(row["exit"] == row["expected_exit"] for row in rows) else "falls short"

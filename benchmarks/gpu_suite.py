"""The test suite on a card: the part `tests` of benchmarks/gpu.py, and the pytest plugin that tells it what happens.

A row is a test file. A file all of whose tests were reached is not run again by the next call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEVICE = "DIFFUSIONBLOCKS_TEST_DEVICE"  # read by tests/conftest.py
REPORTS = "DIFFUSIONBLOCKS_TEST_REPORTS"  # file to which the plugin appends
PROCESSES = 10  # beside the processes of the parts `memory` and `card`
DRY = "tests/unit/test_table.py"
LEFT_OUT = "tests/unit/test_gpu_benchmark.py"  # a dry run of these very benchmarks, on the CPU
OUTCOMES = ("passed", "failed", "skipped")


def tests(results: Any, dry_run: bool) -> None:
    """Runs the suite. Counts and failures are written once a second, so that a killed run leaves what it found."""
    kept = {row["row"]: row for row in results.rows if row["collected"] == sum(row[name] for name in OUTCOMES)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_suite", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", f"--ignore={LEFT_OUT}"]
    if find_spec("xdist") and not dry_run:
        command += ["-n", str(PROCESSES), "--dist", "loadfile"]
    command += [DRY] if dry_run else [f"--ignore={path}" for path in kept]
    with tempfile.TemporaryDirectory(prefix="gpu-tests-") as folder:
        reports, output = Path(folder) / "reports.jsonl", Path(folder) / "output.txt"
        reports.touch()
        paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        own = {DEVICE: "cpu" if dry_run else "cuda", REPORTS: str(reports), "PYTHONPATH": paths}
        with output.open("w") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **own}, stdout=out, stderr=subprocess.STDOUT
            )
            code = None
            while code is None:
                time.sleep(0.2 if dry_run else 1.0)
                code = process.poll()
                _count(results, kept, reports.read_text())
        if code not in (
            (0, 1, 5) if kept else (0, 1)
        ):  # 5: there was nothing left to run; else pytest did not get through
            results.fail("pytest", f"exit code {code}\n" + "\n".join(output.read_text().splitlines()[-5:]))


def _count(results: Any, kept: dict[str, Any], reports: str) -> None:
    """Puts the rows together from the plugin's lines."""
    collected, outcomes, seconds, texts = set[str](), dict[str, str](), Counter[str](), dict[str, str]()
    skipped = set[str]()
    complete = reports[: reports.rfind("\n") + 1]  # the last line may be half written
    for line in map(json.loads, complete.splitlines()):
        if "collected" in line:
            collected.update(line["collected"])
            continue
        test = line["test"]
        seconds[test.partition("::")[0]] += line["seconds"]
        if line["outcome"] == "failed":
            texts[test] = line["text"]
        if line["outcome"] == "skipped":
            skipped.add(test)
        if line["done"]:
            collected.add(test)  # a file that cannot be imported has no tests, but fails
            outcomes[test] = "failed" if test in texts else "skipped" if test in skipped else "passed"
    rows = dict(kept)
    for path in sorted({test.partition("::")[0] for test in collected}):
        own = [test for test in collected if test.partition("::")[0] == path]
        counts = Counter(outcomes[test] for test in own if test in outcomes)
        failures = [{"test": test, "last_lines": texts[test]} for test in own if test in texts]
        row = {"row": path, "collected": len(own), **{name: counts[name] for name in OUTCOMES}}
        rows[path] = {**row, "seconds": round(seconds[path], 2), "failures": failures}
    results.rows[:] = rows.values()
    totals = {name: sum(row[name] for row in rows.values()) for name in OUTCOMES}
    results.content |= {**totals, "not_reached": sum(row["collected"] for row in rows.values()) - sum(totals.values())}
    results.write()


# ---------------------------------------------------------------- the pytest plugin


def pytest_configure(config: Any) -> None:
    if REPORTS in os.environ and not hasattr(config, "workerinput"):  # once, not in every process of pytest-xdist
        kind = _Distributed if config.pluginmanager.hasplugin("xdist") else _Reporter
        config.pluginmanager.register(kind(Path(os.environ[REPORTS])))


class _Reporter:
    def __init__(self, path: Path) -> None:
        self.path = path

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_finish(self, session: Any) -> None:
        self._write({"collected": [item.nodeid for item in session.items]})

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._report(report, done=True)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._report(report, done=report.when not in ("setup", "call"))  # the report of a crashed process has no phase

    def _report(self, report: Any, done: bool) -> None:
        text = "\n".join(str(report.longrepr).splitlines()[-6:]) if report.failed else ""
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": getattr(report, "duration", 0.0)}
        self._write({**line, "done": done, "text": text})


class _Distributed(_Reporter):
    """With pytest-xdist, whose processes do the collecting."""

    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self._write({"collected": list(ids)})

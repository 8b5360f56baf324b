"""Two processes on one folder: exactly one runs, the other says who holds it, and the result is that of a run alone."""

from __future__ import annotations

import re
import socket
import time
from dataclasses import dataclass

import pytest

from tests.faults.harness import (
    ALL,
    TINY,
    USER,
    Fault,
    documented,
    essence,
    nothing_half_written,
    obeys,
    same,
    until,
)

MATRIX = "pairs of processes"
RUN = [*TINY, f"--steps={250 if ALL else 120}", "--train.checkpoint-every=50", "--train.log-every=10"]


@dataclass(frozen=True)
class Pair:
    """What the second process is told, and how many seconds after the first it starts."""

    second: tuple[str, ...]
    delay: float
    residency: str = "device"

    def __str__(self) -> str:
        return f"{' '.join(self.second) or 'the same'}-{self.delay}-{self.residency}"


DELAYS = (0.0, 0.02, 0.1, 0.3, 0.6, 0.9, 1.2)
CASES = [Pair((), delay, residency) for residency in ("device", "disk") for delay in DELAYS]
CASES += [Pair(("--seed=1",), delay) for delay in DELAYS]
CASES += [Pair(("--resume=never",), delay) for delay in (0.0, 0.6)]
_WHOLE: dict[tuple[str, ...], object] = {}


@pytest.mark.parametrize("case", CASES if ALL else CASES[3:4], ids=str)
def test_one_of_two_processes_trains(case, processes, tmp_path, record_property):
    folder = tmp_path / "run"
    base = ("train", "digits", *RUN, f"--residency={case.residency}", "--json")
    first = processes.start(*base, "--output-dir", folder)
    time.sleep(case.delay)
    second = processes.start(*base, *case.second, "--output-dir", folder)
    ends = [first.wait(), second.wait()]
    for outcome in ends:
        obeys(outcome, 0, USER, json_object=True)
    codes = [outcome.code for outcome in ends]
    if sorted(codes) != [0, USER]:
        raise Fault("exit code", f"exit codes {codes}: {[outcome.line for outcome in ends]}")
    winner, refused = (0, 1) if codes[0] == 0 else (1, 0)
    pid, line = (first, second)[winner].pid, ends[refused].line
    other = bool(case.second) and "another configuration" in line  # which may be seen first
    if not other and (not re.search(rf"\b{pid}\b", line) or socket.gethostname() not in line):
        raise Fault("message", f"does not say that process {pid} on {socket.gethostname()} holds it: {line}")
    nothing_half_written(folder)
    own = (*base, *(case.second if winner else ()))
    if own not in _WHOLE:
        obeys(processes.run(*own, "--output-dir", tmp_path / "alone"), 0)
        _WHOLE[own] = essence(tmp_path / "alone")
    same(essence(folder), _WHOLE[own], "the result of the one that ran")
    documented(
        record_property, "Two processes", "train in a folder where another process trains", ends[refused], run=folder
    )


@pytest.mark.skipif(not ALL, reason="starts interpreters: only in make faults")
@pytest.mark.parametrize("delay", [0.0, 0.5, 1.2])
def test_one_of_two_comparisons_runs(delay, processes, tmp_path):
    folder = tmp_path / "compared"
    command = ("compare", "digits", *TINY, "--steps=300", "--methods=shallow", "--json", "--output-dir", folder)
    first = processes.start(*command)
    time.sleep(delay)
    second = processes.start(*command)
    ends = [first.wait(180), second.wait(180)]
    for outcome in ends:
        obeys(outcome, 0, USER, json_object=True)
    codes = sorted(outcome.code for outcome in ends)
    if codes != [0, USER]:
        raise Fault("exit code", f"exit codes {codes}: {[outcome.line for outcome in ends]}")
    nothing_half_written(folder)


@pytest.mark.skipif(not ALL, reason="long: only in make faults")
@pytest.mark.parametrize("command", ["evaluate", "report", "sample"])
def test_others_read_a_run_while_it_trains(command, processes, tmp_path):
    """A run that trains has checkpoints but no summary: it can be evaluated, and reading it changes nothing."""
    folder = tmp_path / "run"
    base = ("train", "digits", *RUN, "--output-dir")
    process = processes.start(*base, folder)
    assert until(lambda: next(folder.glob("checkpoints/step-*"), None), 60)
    obeys(processes.run(command, folder), 0, USER)
    obeys(process.wait(), 0)
    nothing_half_written(folder)
    obeys(processes.run(*base, tmp_path / "alone"), 0)
    alone, found = essence(tmp_path / "alone"), essence(folder)
    found["files"] = [name for name in found["files"] if name != "report.html"]
    same(found, alone, f"the run during which there was {command}")


def test_a_lock_whose_owner_was_killed_is_taken_over(processes, tmp_path):
    folder = tmp_path / "run"
    command = ("train", "digits", *RUN, "--steps=60", "--output-dir", folder)
    process = processes.start(*command)
    assert until(lambda: next(folder.glob("checkpoints/step-*"), None), 60)
    process.send(9)
    process.wait()
    obeys(processes.run(*command), 0)

"""(phase x signal): Ctrl-C once, twice and three times, and SIGTERM, in every phase of every command.

Each is answered within 10 s with exit code 130 or 143 and one line; the same command then finishes with the result of a
run that nobody interrupted. A phase is found by looking at the run folder, and by how long an undisturbed run takes
from there to its end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import (
    ALL,
    INTERRUPTED,
    SHORT,
    TERMINATED,
    TINY,
    Fault,
    essence,
    few,
    files,
    fresh,
    nothing_half_written,
    nothing_lost,
    obeys,
    same,
    until,
)

MATRIX = "signals"
INT, TERM = signal.SIGINT, signal.SIGTERM
SIGNALS = {"Ctrl-C": (INT,), "SIGTERM": (TERM,), "two Ctrl-C": (INT, INT), "three Ctrl-C": (INT, INT, INT)}
ANSWER = 10.0  # seconds in which a signal must be answered
RUN = [*TINY, "--steps=60", "--train.checkpoint-every=20", "--train.log-every=2", "--order=sweep", "--residency=disk"]


def _has(*names: str) -> Callable[[Path], bool]:
    return lambda folder: any(next(folder.glob(name), None) for name in names)


def _checkpoints(count: int) -> Callable[[Path], bool]:
    return lambda folder: len(list(folder.glob("checkpoints/step-*"))) >= count


@dataclass(frozen=True)
class Phase:
    """begins: when it does, by what the run folder holds. share: of the time from there to the end of the run, to
    wait."""

    name: str
    begins: Callable[[Path], bool]
    share: float = 0.0


PHASES = (
    Phase("start", lambda folder: True),
    Phase("reading data", lambda folder: folder.is_dir()),
    Phase("first steps", _has("metrics.jsonl")),
    Phase("training", _checkpoints(1), 0.2),
    Phase("saving a checkpoint", _has("checkpoints/*partial*")),
    Phase("saving the model", _has("model", "model.partial")),
    *(Phase(f"evaluation and measuring, {share:.0%}", _has("model", "model.partial"), share)
        for share in (0.1, 0.3, 0.5, 0.7, 0.9)),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    phase: Phase
    signals: str
    every: float  # seconds between signals

    def __str__(self) -> str:
        return f"{self.phase.name}-{self.signals}-{self.every}"


CASES = [Case(phase, signals, 0.05) for phase, signals in product(PHASES, SIGNALS)]
CASES += [Case(PHASES[3], signals, every) for signals in ("two Ctrl-C", "three Ctrl-C") for every in (0.0, 0.3)]


@pytest.fixture(scope="module")
def undisturbed(processes, tmp_path_factory):
    """Result of the run, and how long it takes from the beginning of every phase to its end."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    process = processes.start("train", "digits", *RUN, "--output-dir", folder)
    began: dict[str, float] = {}
    while process.running:
        for phase in PHASES:
            if phase.name not in began and phase.begins(folder):
                began[phase.name] = time.monotonic()
        time.sleep(0.002)
    ended = time.monotonic()
    obeys(process.wait(), 0)
    return essence(folder), {phase.name: ended - began.get(phase.name, ended) for phase in PHASES}


def _stopped(process: Any, sent: tuple[int, ...], every: float) -> Any:
    """Sends the signals and applies the laws of an answer. A process that had finished is told by exit code 0."""
    process.send(*sent, every=every)
    began = time.monotonic()
    outcome = process.wait(60)
    took = time.monotonic() - began
    obeys(outcome, 0, TERMINATED if TERM in sent else INTERRUPTED)
    if took > ANSWER:
        raise Fault("slow", f"answered after {took:.1f} s")
    return outcome


@pytest.mark.parametrize("case", few(CASES, 1), ids=str)
def test_a_signal_stops_a_run_and_the_same_command_goes_on(case, undisturbed, processes, tmp_path):
    whole, left = undisturbed
    folder = tmp_path / "run"
    command = ("train", "digits", *RUN, "--output-dir", folder)
    process = processes.start(*command)
    until(lambda: case.phase.begins(folder) or not process.running, 60, every=0.0005)
    time.sleep(case.phase.share * left[case.phase.name])
    outcome = _stopped(process, SIGNALS[case.signals], case.every)
    if outcome.code and folder.exists():
        nothing_half_written(folder)
    obeys(processes.run(*command), 0)
    nothing_half_written(folder)
    same(essence(folder), whole, "the run after a signal")


# ---------------------------------------------------------------- other commands

OTHERS = {
    "evaluate": lambda run, out: ("evaluate", run),
    "sample": lambda run, out: ("sample", run, "--output", out / "p.json"),
    "report": lambda run, out: ("report", run, "--output", out / "r.html"),
    "export": lambda run, out: ("export", run, "--block=1", "--output", out / "b.safetensors"),
    "plan": lambda run, out: ("plan", "digits", *TINY, "--num-blocks=1", "--memory=1GiB"),
}
OTHER_CASES = [
    (name, signals, share) for name, signals, share in product(OTHERS, ("Ctrl-C", "SIGTERM"), (0.2, 0.5, 0.9))
]


@pytest.mark.parametrize(("name", "signals", "share"), OTHER_CASES if ALL else OTHER_CASES[7:8])
def test_a_signal_stops_every_other_command(name, signals, share, digits, processes, tmp_path):
    run, out = fresh(digits, tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    began, before = time.monotonic(), files(run)
    obeys(processes.run(*OTHERS[name](run, out)), 0)
    lasts, made = time.monotonic() - began, files(out)
    for path in out.iterdir():
        path.unlink()
    process = processes.start(*OTHERS[name](run, out))
    time.sleep(share * lasts)
    outcome = _stopped(process, SIGNALS[signals], 0)
    nothing_lost(before, run)
    nothing_half_written(tmp_path)
    if outcome.code and not files(out).items() <= made.items():
        raise Fault("left over", f"half written: {sorted(files(out))}")


@pytest.mark.parametrize("delay", few((0.3, 0.8, 1.5, 2.2), 1))
@pytest.mark.parametrize("number", (INT, TERM) if ALL else (TERM,))
def test_a_signal_while_the_package_is_imported(number, delay, tmp_path):
    """Before the command begins, a plain interpreter with `python -m`, as a user starts it."""
    command = [sys.executable, "-m", "diffusionblocks.cli", "train", "digits", *SHORT, "--output-dir", tmp_path / "run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(delay)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    if "Traceback" in err:
        raise Fault("traceback", err[-1500:])
    if code not in (0, 128 + number):
        raise Fault("exit code", f"{code}: {err[-500:]}")


# ---------------------------------------------------------------- compare and its children


def children(folder: Path) -> list[int]:
    """Processes that train below a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            state = (path / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if b"train" in words and any(str(folder).encode() in word for word in words) and state != "Z":
            found.append(int(path.name))
    return found


STOPS = [(name, jobs) for name, jobs in product(("SIGKILL", "SIGTERM", "Ctrl-C", "two Ctrl-C"), (1, 2))]


@pytest.mark.skipif(not ALL, reason="starts interpreters: only in make faults")
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="children are found in /proc, which is not here")
@pytest.mark.parametrize(("name", "jobs"), STOPS)
def test_compare_takes_its_children_with_it(name, jobs, processes, tmp_path):
    folder = tmp_path / "compared"
    methods = "shallow,diffusionblocks" if jobs == 2 else "shallow"
    arguments = ("compare", "digits", *TINY, "--steps=3000", f"--methods={methods}", f"--jobs={jobs}")
    process = processes.start(*arguments, "--output-dir", folder)
    assert until(lambda: next(folder.glob("*/seed-0/metrics.jsonl"), None) or not process.running, 90, 0.05)
    running = children(folder)
    assert len(running) == jobs, process.error()
    if name == "SIGKILL":
        process.send(signal.SIGKILL)
        process.wait()
    else:
        _stopped(process, SIGNALS[name], 0.2)
    if not until(lambda: not children(folder), 15, 0.1):
        for pid in children(folder):
            os.kill(pid, signal.SIGKILL)
        raise Fault("left over", f"children still train 15 s after {name}")
    nothing_half_written(folder)

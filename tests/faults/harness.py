"""What every attack shares: commands in this process and in others, the laws that each must obey, and what is counted.

A case fails with a `Fault`, whose kind is what the result of `make faults` counts. The suite runs a few cases of every
matrix, drawn once with a fixed seed; DIFFUSIONBLOCKS_FAULTS=all runs them all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from diffusionblocks.cli import main

ALL = os.environ.get("DIFFUSIONBLOCKS_FAULTS") == "all"
RECORDS = os.environ.get("DIFFUSIONBLOCKS_FAULTS_RECORDS", "")  # folder that the full run collects its counts in
KINDS = ("traceback", "silently wrong", "lost", "exit code", "message", "left over", "slow", "code ran")
USER, FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143
Case = TypeVar("Case")

# A network that trains in a second, with three blocks and several checkpoints.
TINY = [
    "--model.hidden-size=8", "--model.num-hidden-layers=3", "--model.num-attention-heads=2",
    "--model.intermediate-size=16", "--model.patch-size=4", "--batch-size=8",
]  # fmt: skip
SHORT = [*TINY, "--steps=6", "--train.checkpoint-every=4", "--train.log-every=2", "--train.keep-checkpoints=3"]
PLACES: dict[str, Path] = {}  # of what fixtures made, for tables of commands


def adapting() -> list[str]:
    """The command that makes the fixture `adapted`, without its folder."""
    own = PLACES["pretrained"]
    return [
        *("adapt", str(own / "network"), f"--data.path={own / 'texts'}", "--data.length=32", "--steps=4"),
        *(
            "--batch-size=4",
            "--data.evaluated=8",
            "--data.general=",
            "--train.warmup=0",
            "--evaluation.continuations=2",
        ),
        *("--evaluation.continued=4", f"--data.cache-dir={own / 'cache'}"),
    ]


class Fault(AssertionError):
    """A law was broken. kind: one of KINDS."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind = kind


def few(cases: Iterable[Case], count: int) -> list[Case]:
    """All cases in the full run, else `count` of them, the same every time."""
    cases = list(cases)
    if ALL or count >= len(cases):
        return cases
    chosen = sorted(random.Random(20).sample(range(len(cases)), count))
    return [cases[index] for index in chosen]


# ---------------------------------------------------------------- commands


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code as a shell shows it, and what it printed."""

    code: int
    out: str
    err: str
    signal: int = 0  # that ended it

    @property
    def line(self) -> str:
        """The last line of stderr."""
        return ([line for line in self.err.splitlines() if line.strip()] or [""])[-1]

    def json(self) -> Any:
        """What was printed with --json. Raises Fault where that is not one JSON object."""

        def refuse(constant: str) -> None:
            raise Fault("silently wrong", f"{constant} in what --json prints")

        try:
            return json.loads(self.out, parse_constant=refuse)
        except ValueError:
            raise Fault("silently wrong", f"--json printed {self.out[:200]!r}") from None


def call(*arguments: object) -> Outcome:
    """One command in this process; an exception that leaves it counts as the traceback that a user would see."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except Exception:
            traceback.print_exc()
            code = 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Outcome(code, out.getvalue(), err.getvalue())


class Process:
    """A command in a process of its own."""

    def __init__(self, processes: Processes, folder: Path, number: int) -> None:
        self._processes, self._number, self._folder = processes, number, folder
        self.pid = 0
        self._code: int | None = None

    @property
    def running(self) -> bool:
        with self._processes.changed:
            return self._code is None

    def send(self, *numbers: int, every: float = 0.0) -> None:
        """Sends signals, one after the other; to a process that has ended, none."""
        for index, number in enumerate(numbers):
            if index:
                time.sleep(every)
            with self._processes.changed:
                if self._code is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self.pid, number)

    def error(self) -> str:
        """What it has written to stderr until now."""
        return (self._folder / "err").read_text(errors="replace")

    def wait(self, seconds: float = 120.0) -> Outcome:
        """Raises Fault where the process does not end in time (it is then killed)."""
        end = time.monotonic() + seconds
        with self._processes.changed:
            while self._code is None:
                left = end - time.monotonic()
                if left <= 0:
                    os.kill(self.pid, signal.SIGKILL)
                    raise Fault("slow", f"still running after {seconds:.0f} s")
                self._processes.changed.wait(left)
        out = (self._folder / "out").read_text(errors="replace")
        code = self._code if self._code >= 0 else 128 - self._code
        return Outcome(code, out, self.error(), max(0, -self._code))


class Processes:
    """Starts commands through server.py, which needs no time for imports."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count()
        self.changed = threading.Condition()
        self._begun: dict[int, Process] = {}
        self._by_pid: dict[int, Process] = {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert self._server.stdout is not None
        assert json.loads(self._server.stdout.readline())["ready"]
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            message = json.loads(line)
            with self.changed:
                if "id" in message:
                    process = self._begun[message["id"]]
                    process.pid = message["pid"]
                    self._by_pid[process.pid] = process
                else:
                    self._by_pid.pop(message["pid"])._code = message["code"]
                self.changed.notify_all()

    def start(self, *arguments: object, memory: int = 0, cwd: Path | None = None) -> Process:
        """Begins a command and returns when its process is there. memory: bytes of address space that it may have."""
        assert self._server.stdin is not None
        number = next(self._numbers)
        folder = self._folder / f"process-{number}"
        folder.mkdir(parents=True)
        (folder / "out").touch()
        (folder / "err").touch()
        process = self._begun[number] = Process(self, folder, number)
        request = {
            **{"id": number, "argv": [str(argument) for argument in arguments], "cwd": str(cwd or folder)},
            **{"out": str(folder / "out"), "err": str(folder / "err"), "memory": memory},
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        with self.changed:
            assert self.changed.wait_for(lambda: process.pid, 30)
        return process

    def run(self, *arguments: object, **options: Any) -> Outcome:
        return self.start(*arguments, **options).wait()

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)


def until(condition: Callable[[], Any], seconds: float, every: float = 0.002) -> bool:
    """Waits for something to become true; says whether it did in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(every)
    return bool(condition())


# ---------------------------------------------------------------- laws


def obeys(outcome: Outcome, *codes: int, json_object: bool = False) -> Outcome:
    """The laws of every command: a documented exit code, no traceback, one line that says what is wrong, valid JSON."""
    shown = f"exit {outcome.code}: {outcome.err[-1500:]}"
    if "Traceback" in outcome.err or "Traceback" in outcome.out:
        raise Fault("traceback", shown)
    if outcome.code not in (codes or (0, USER)):
        raise Fault("exit code", f"expected {codes or (0, USER)}, got {shown}")
    if outcome.code and not outcome.signal:
        ours = [line for line in outcome.err.splitlines() if line.startswith("dblocks: ")]
        if len(ours) != 1 or outcome.line != ours[0]:
            raise Fault("message", f"not one last line 'dblocks: ...': {shown}")
        if len(ours[0]) > 2000 or len(ours[0]) < 12:
            raise Fault("message", f"{len(ours[0])} characters: {ours[0][:300]}")
    if not outcome.code and json_object:
        outcome.json()
    return outcome


def same(found: Any, expected: Any, what: str) -> None:
    if found != expected:
        raise Fault("silently wrong", f"{what}: {_difference(found, expected)}")


def _difference(found: Any, expected: Any) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
        if keys:
            return f"{keys[0]}: {_difference(found.get(keys[0]), expected.get(keys[0]))} ({len(keys)} differ)"
    return f"{str(found)[:200]} instead of {str(expected)[:200]}"


def files(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its content, but lock files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file() and "lock" not in path.name.replace("block", ""):
            found[name] = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    return found


def nothing_half_written(folder: Path) -> None:
    """No file or folder that is only there while something is being written."""
    left = [str(path.relative_to(folder)) for path in folder.rglob("*") if "partial" in path.name]
    if left:
        raise Fault("left over", ", ".join(sorted(left)[:5]))


def nothing_lost(before: dict[str, str], folder: Path, but: Sequence[str] = ()) -> None:
    """Every file that was there is still there, as it was, but those whose names begin with one of `but`."""
    after = files(folder)
    for name, content in before.items():
        if not name.startswith(tuple(but)) and after.get(name) != content:
            raise Fault("lost", f"{name} is {'changed' if name in after else 'gone'}")


_TIMES = ("seconds", "wall_seconds", "tokens_per_second", "warnings", "reserved", "git_commit")


def timeless(content: Any) -> Any:
    """Nested JSON without what differs from run to run: times, warnings (a resumed run says so) and the commit."""
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if key not in _TIMES and key != "blake2b"}
    return [timeless(value) for value in content] if isinstance(content, list) else content


def essence(folder: Path) -> dict[str, Any]:
    """What must be the same however often a run was interrupted: names of files, weights, journal and summary."""
    found: dict[str, Any] = {"files": sorted(files(folder))}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = files(path.parent)[path.name]
        elif path.suffix == ".json" and path.name != "state.json":
            found[name] = timeless(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name == "state.json":  # the journal's length counts the digits of seconds
            state = timeless(json.loads(path.read_text()))
            found[name] = {key: value for key, value in state.items() if key not in ("progress", "files", "journal")}
    return found


def finite(content: Any) -> bool:
    """Whether all numbers of a parsed JSON value are finite."""
    if isinstance(content, dict):
        return all(map(finite, content.values()))
    if isinstance(content, list):
        return all(map(finite, content))
    return not isinstance(content, float) or math.isfinite(content)


# ---------------------------------------------------------------- what is counted


@dataclass
class Row:
    """A line of docs/errors.md."""

    group: str
    what: str
    message: str
    code: int


def documented(item: Callable[[str, object], None], group: str, what: str, outcome: Outcome, **paths: object) -> None:
    """Puts a case into docs/errors.md; paths of this machine are replaced by their names."""
    line = outcome.line.removeprefix("dblocks: ")
    for name, path in paths.items():
        line = line.replace(str(path), name.upper())
    line = re.sub(r"/tmp/[^\s:;,')]*/", "", line)
    line = re.sub(r"\b(process|pid)( id)? \d+", r"\1 4711", line)
    item("row", dataclasses.asdict(Row(group, what, line, outcome.code)))


@contextlib.contextmanager
def tally(record: Callable[[str, object], None], cases: int) -> Iterator[dict[str, list[str]]]:
    """Many cases in one test: the dict maps a kind of fault to the cases that had it; any makes the test fail at the
    end."""
    faults: dict[str, list[str]] = {}
    yield faults
    record("cases", cases)
    record("faults", {kind: len(names) for kind, names in faults.items()})
    if faults:
        kind = next(iter(faults))
        shown = "; ".join(f"{len(names)} {kind}, such as {names[:3]}" for kind, names in faults.items())
        raise Fault(kind, f"of {cases} cases: {shown}")


def fresh(source: Path, target: Path) -> Path:
    """A copy of a run folder to be damaged."""
    shutil.copytree(source, target, symlinks=True)
    return target


def require(condition: object, reason: str) -> None:
    if not condition:
        pytest.skip(reason)

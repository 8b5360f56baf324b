"""kill -9 at random moments, then the same command again: the result is that of the run that nobody killed."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass, replace
from itertools import product

import pytest

from tests.faults.harness import ALL, TINY, Fault, essence, nothing_half_written, obeys, same

MATRIX = "kills"
RUN = [*TINY, "--steps=12", "--train.checkpoint-every=3", "--train.log-every=2"]


@dataclass(frozen=True)
class Kill:
    """A run that is killed so many times before it may finish."""

    order: str
    residency: str
    kills: int
    preset: str = ""

    def __str__(self) -> str:
        return f"{self.order}-{self.residency}-{self.kills}{self.preset}"

    @property
    def arguments(self) -> list[str]:
        chosen = [f"--order={self.order}", f"--residency={self.residency}"]
        return [*RUN, *chosen, *([f"--preset={self.preset}"] if self.preset else [])]


ORDERS = ("sweep", "cyclic", "random", "sequential")
CASES = [Kill(order, residency, 4) for order, residency in product(ORDERS, ("device", "host", "disk"))]
CASES += [Kill("random", residency, 4, "paper") for residency in ("device", "disk")]  # 56 kills in all


@pytest.mark.parametrize("case", CASES if ALL else [replace(CASES[8], kills=1)], ids=str)
def test_a_killed_run_goes_on_to_the_same_result(case, processes, tmp_path, record_property):
    began = time.monotonic()
    command = ["train", "digits", *case.arguments, "--json", "--output-dir"]
    obeys(processes.run(*command, tmp_path / "whole"), 0)
    whole, lasts = essence(tmp_path / "whole"), time.monotonic() - began
    draw, folder, kills = random.Random(str(case)), tmp_path / "killed", 0
    while kills < case.kills:
        process = processes.start(*command, folder)
        time.sleep(draw.uniform(0.05, lasts))
        if not process.running:  # a run that finished is begun anew, so that every kill meets a run
            obeys(process.wait(), 0)
            same(essence(folder), whole, "the run after a kill")
            folder = tmp_path / f"killed-{kills}-{draw.random()}"
            continue
        process.send(signal.SIGKILL)
        process.wait()
        kills += 1
    record_property("cases", kills)
    obeys(processes.run(*command, folder), 0, json_object=True)
    nothing_half_written(folder)
    same(essence(folder), whole, "the run after a kill")
    if (folder / "residency").exists():
        raise Fault("left over", "residency")

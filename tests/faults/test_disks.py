"""(place x disk): full and read-only disks. One line, exit code 1 (full) or 2 (a wrong place), nothing half written,
nothing lost.

The disks are small file systems in memory, which root may mount; so may anybody below `unshare -rm`, as `make faults`
does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import (
    FAILED,
    TINY,
    USER,
    documented,
    essence,
    few,
    files,
    fresh,
    nothing_half_written,
    nothing_lost,
    obeys,
    same,
)

MATRIX = "disks"
RUN = [*TINY, "--model.hidden-size=16", "--steps=12", "--train.checkpoint-every=9", "--train.log-every=1"]


def _mount(*arguments: object) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here ({done.stderr.strip()}): run it as root, or below unshare -rm")


class Disk:
    """A file system of its own, of so many KiB."""

    def __init__(self, folder: Path, size: int) -> None:
        if not sys.platform.startswith("linux"):
            pytest.skip("small disks are mounted with Linux's tmpfs")
        folder.mkdir()
        _mount("-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder)
        self.folder = folder

    def resize(self, size: int) -> None:
        _mount("-o", f"remount,size={size}k", self.folder)

    def read_only(self) -> None:
        _mount("-o", "remount,ro", self.folder)

    def fill(self, left: int = 0) -> None:
        """Fills the disk, but so many bytes."""
        with (self.folder / "filler").open("wb", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(4096))
            except OSError:
                stream.truncate(max(0, stream.tell() - left))

    def used(self) -> int:
        """KiB."""
        found = os.statvfs(self.folder)
        return (found.f_blocks - found.f_bfree) * found.f_frsize // 1024


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[int], Disk]]:
    made: list[Disk] = []

    def make(size: int) -> Disk:
        made.append(Disk(tmp_path / f"disk-{len(made)}", size))
        return made[-1]

    yield make
    for one in made:
        subprocess.run(["umount", "-l", str(one.folder)], check=True)


# ---------------------------------------------------------------- a disk that gets full somewhere in a run


@pytest.fixture(scope="module")
def needed(processes, tmp_path_factory):
    """The result of a run on a large disk by residency, and the KiB that it needs."""
    found: dict[str, Any] = {}

    def measure(residency: str) -> Any:
        if residency not in found:
            one = Disk(tmp_path_factory.mktemp("large") / "disk", 1 << 16)
            process = processes.start(
                "train", "digits", *RUN, f"--residency={residency}", "--output-dir", one.folder / "run"
            )
            most = 0
            while process.running:
                most = max(most, one.used())
                time.sleep(0.002)
            obeys(process.wait(), 0)
            found[residency] = (essence(one.folder / "run"), most)
            subprocess.run(["umount", "-l", str(one.folder)], check=True)
        return found[residency]

    return measure


SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@pytest.mark.parametrize(("residency", "share"), few([(r, s) for r in ("disk", "device") for s in SHARES], 1))
def test_a_run_on_a_disk_that_gets_full_goes_on_when_there_is_room(
    residency, share, disk, needed, processes, tmp_path, record_property
):
    whole, most = needed(residency)
    one = disk(max(8, int(share * most)))
    folder = one.folder / "run"
    command = ("train", "digits", *RUN, f"--residency={residency}", "--json", "--output-dir", folder)
    outcome = obeys(processes.run(*command), 0, FAILED, json_object=True)
    if outcome.code:
        nothing_half_written(one.folder)
        documented(record_property, "Disks", "train on a disk that is full", outcome, run=folder)
    one.resize(1 << 16)
    obeys(processes.run(*command), 0, json_object=True)
    same(essence(folder), whole, "the run after the disk was full")


# ---------------------------------------------------------------- full and read-only disks where results are written


@dataclass(frozen=True)
class Place:
    """A command that writes on a disk. inside: whether its run folder is on the disk too."""

    name: str
    arguments: Callable[[Path, Path], tuple[object, ...]]  # (run folder, disk)
    base: str = "digits"
    inside: bool = False
    reads_only: bool = False  # works on a disk that cannot be written

    def __str__(self) -> str:
        return self.name


TEXT = [
    "--model.hidden-size=8", "--model.num-hidden-layers=3", "--model.num-attention-heads=2",
    "--model.intermediate-size=16", "--steps=2", "--batch-size=4", "--data.length=16", "--evaluation.num-samples=0",
]  # fmt: skip
PLACES = (
    Place("report", lambda run, disk: ("report", run, "--output", disk / "report.html")),
    Place("report in the run folder", lambda run, disk: ("report", run), inside=True),
    Place("sample", lambda run, disk: ("sample", run, "--output", disk / "samples.json")),
    Place("sample of texts", lambda run, disk: ("sample", run, "--num=2", "--output", disk / "t.txt"), base="adapted"),
    Place("export of a block", lambda run, disk: ("export", run, "--block=0", "--output", disk / "block.safetensors")),
    Place("export of a network", lambda run, disk: ("export", run, "--output", disk / "network"), base="adapted"),
    Place("export in the run folder", lambda run, disk: ("export", run, "--block=0"), inside=True),
    Place("evaluate", lambda run, disk: ("evaluate", run), inside=True, reads_only=True),
    Place("sample without an output", lambda run, disk: ("sample", run), inside=True, reads_only=True),
    Place("train of a finished run", lambda run, disk: ("train", "digits", *BASE, "--output-dir", run), inside=True),
    Place("train of a stopped run", lambda run, disk: ("train", "digits", *BASE, "--output-dir", run), base="stopped",
        inside=True),
    Place("train of a new run", lambda run, disk: ("train", "digits", *BASE, "--output-dir", disk / "new")),
    Place("compare", lambda run, disk: ("compare", "digits", *BASE, "--methods=shallow", "--output-dir", disk / "new")),
    Place(
        "text cache",
        lambda run, disk: (
            "train", "lm-pydocs", *TEXT, "--output-dir", run / "../new", "--data.cache-dir", disk / "cache"),
    ),
)  # fmt: skip
BASE = [*TINY, "--steps=6", "--train.checkpoint-every=4", "--train.log-every=2", "--train.keep-checkpoints=3"]


@pytest.mark.parametrize(("place", "left"), few([(p, n) for p in PLACES for n in (0, 4096)], 1), ids=str)
def test_a_full_disk_is_one_line_and_nothing_is_half_written(
    place, left, disk, processes, request, tmp_path, record_property
):
    one = disk(8 << 10)
    run = fresh(request.getfixturevalue(place.base), (one.folder if place.inside else tmp_path) / "run")
    one.fill(left)
    before, own = files(one.folder), files(run)
    outcome = obeys(processes.run(*place.arguments(run, one.folder)), 0, *(() if place.reads_only else (FAILED,)))
    nothing_half_written(one.folder)
    nothing_half_written(run)
    nothing_lost(before, one.folder, ("run/checkpoints", "run/metrics.jsonl"))
    nothing_lost(own, run, ("checkpoints", "metrics.jsonl"))
    if outcome.code:
        more = files(one.folder).keys() - before.keys()
        assert not {name for name in more if name.endswith((".html", ".txt", ".png", ".safetensors"))}, more
        documented(record_property, "Disks", f"{place.name} on a full disk", outcome, run=run, disk=one.folder)


def _read_only_codes(place: Place) -> tuple[int, ...]:
    if place.reads_only:
        return (0,)
    return (0, USER) if "finished" in place.name else (USER,)


@pytest.mark.parametrize("place", few(PLACES, 1), ids=str)
def test_a_read_only_disk_is_a_wrong_place(place, disk, processes, request, tmp_path, record_property):
    one = disk(8 << 10)
    run = fresh(request.getfixturevalue(place.base), (one.folder if place.inside else tmp_path) / "run")
    one.read_only()
    own = files(run)
    outcome = obeys(processes.run(*place.arguments(run, one.folder)), *_read_only_codes(place))
    nothing_half_written(tmp_path)
    nothing_lost(own, run)
    if outcome.code:
        documented(record_property, "Disks", f"{place.name} on a read-only disk", outcome, run=run, disk=one.folder)

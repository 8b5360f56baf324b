"""Everything that a CUDA card has to show, in one run of at most 8 minutes on one card with 16 cores.

    python benchmarks/gpu.py all                 every part, then one table of what must hold
    python benchmarks/gpu.py speed               one part (or several)
    python benchmarks/gpu.py all --dry-run       every part on the CPU with tiny networks (nothing is compiled), in a
                                                 minute, into a temporary folder

Parts:
    speed    tokens or images per second against a plain training loop and end-to-end training (gpu_speed.py)
    large    a Llama of 6.7 billion parameters by `exact`, and end to end where it fits (gpu_large.py)
    tests    the test suite on the card (gpu_suite.py)
    memory   rows of benchmarks/memory.py: predicted against torch.cuda.max_memory_allocated, and reserved memory
    card     a smaller card (a share of this one): end-to-end training stops there with exit code 1, blocks train

All processes inherit the environment. So what another setting of torch's allocator does to `reserved` and to speed is
seen from a second run, whose rows do not mix with the first's:

    PYTORCH_ALLOC_CONF=expandable_segments:True python benchmarks/gpu.py speed memory --output-dir FOLDER

Each part is a process of its own with a time limit and writes benchmarks/results/gpu-PART.json row by row
(gpu_results.py): a part that is stopped leaves its finished rows, and the same command goes on with what is missing.
Parts of one stage run together, the timed ones alone. It exits with 0 if every part ran to its end, whatever its
figures, and with 1 if one was stopped or a row could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# What needs torch or another package is imported inside functions: packages that are not installed must not keep the
# other parts from being measured, and this process only starts others.

ROOT = Path(__file__).parents[1]
SOURCES = str(ROOT / "src")
RESULTS = Path(__file__).parent / "results"
ENOUGH = ("torch", "transformers", "safetensors", "numpy", "yaml")  # for any part
ROWS_NEED = ("diffusers", "peft", "bitsandbytes", "xdist", "pytest_timeout")  # for single rows, or to be fast
MEMORY_JOBS = 5
NETWORK = ["--model.hidden-size", "1024", "--model.num-attention-heads", "16", "--model.intermediate-size", "4096"]
TRAIN = ["digits", *NETWORK, "--batch-size", "256", "--steps", "120", "--train.checkpoint-every", "40"]
DRY_TRAIN = [
    "digits",
    "--model.hidden-size",
    "16",
    "--model.num-attention-heads",
    "2",
    "--model.intermediate-size",
    "32",
]
DRY_TRAIN += ["--model.num-hidden-layers", "2", "--batch-size", "4", "--steps", "2", "--device", "cpu"]
SMALLER = """
import sys, torch
if float(sys.argv[1]) < 1:
    torch.cuda.set_per_process_memory_fraction(float(sys.argv[1]))
from diffusionblocks.cli import main
sys.exit(main(sys.argv[2:]))
"""


def speed(results: Any, dry_run: bool) -> None:
    from gpu_speed import speed as measure

    measure(results, dry_run)


def large(results: Any, dry_run: bool) -> None:
    from gpu_large import large as measure

    measure(results, dry_run)


def tests(results: Any, dry_run: bool) -> None:
    from gpu_suite import tests as run

    run(results, dry_run)


# ---------------------------------------------------------------- memory


def memory_rows(dry_run: bool) -> Iterator[dict[str, Any]]:
    """Of benchmarks/memory.py: one number of blocks, the shortest and longest truncation, every setting, and
    of methods that need alike in several families one."""
    from memory import rows

    for row in rows():
        family, method, train = row["family"], row["method"], row["train"]
        if dry_run and ((family, method) != ("vit", "end-to-end") or train):
            continue
        split = method in ("exact", "diffusionblocks") and family != "looped"
        alike = method == "last-block" or (method == "lora" and family != "llama")
        if family in ("dit", "masked text"):
            alike = alike or method == "shallow" or "activation_checkpointing" in train
        if not alike and (row["num_blocks"] == 3 or not split) and row.get("truncation", 1) in (1, 16):
            yield row


def label(row: dict[str, Any]) -> str:
    changed = [f"{key} {value}" for group in (row["train"], row["blocks"]) for key, value in group.items()]
    truncation = [f"truncation {row['truncation']}"] if "truncation" in row else []
    return ", ".join([row["family"], row["method"], f"B = {row['num_blocks']}", *truncation, *changed])


def needs(row: dict[str, Any]) -> str:
    """The package that a row of `memory` needs, if any."""
    if row["train"].get("optimizer") == "adamw-8bit":
        return "bitsandbytes"
    return {"lora": "peft"}.get(row["method"], "diffusers" if row["family"] == "dit" else "")


def memory(results: Any, dry_run: bool) -> None:
    """Nothing is timed, so rows run together."""
    wanted = {label(row): row for row in memory_rows(dry_run)}
    runnable = []
    for name, row in wanted.items():
        if needs(row) and find_spec(needs(row)) is None:
            results.skip(name, needs(row))
        elif not results.has(name):
            runnable.append(name)

    def run(name: str) -> subprocess.CompletedProcess[str]:
        script, row = str(ROOT / "benchmarks" / "memory.py"), json.dumps(wanted[name])
        words = [sys.executable, script, row, "cpu" if dry_run else "cuda"]
        return subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    with ThreadPoolExecutor(MEMORY_JOBS) as pool:
        started = {pool.submit(run, name): name for name in runnable}
        for done in as_completed(started):
            name, out = started[done], done.result()
            if out.returncode:
                results.fail(name, out.stderr)
                continue
            found = json.loads(out.stdout.splitlines()[-1])
            over = found["reserved"] / found["measured"] if "reserved" in found else None
            results.add({"row": name, **found, "reserved_over_allocated": over})


# ---------------------------------------------------------------- card


def dblocks_run(fraction: float, words: list[str], stop_after: Path | None = None) -> dict[str, Any]:
    """A command on a card of that share. stop_after: Ctrl-C as soon as this folder has something."""
    command = [sys.executable, "-c", SMALLER, str(fraction), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while stop_after is not None and process.poll() is None:
        if stop_after.is_dir() and os.listdir(stop_after):
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.05)
    out, _ = process.communicate()
    return {"exit": process.returncode, "text": "\n".join(out.strip().splitlines()[-6:])}


def card(results: Any, dry_run: bool) -> None:
    """The small card lies half way between what the two methods need by plan. Three runs go on from one another."""
    if len(results.rows) == 4:
        return
    results.rows.clear()
    train = DRY_TRAIN if dry_run else [*TRAIN, "--device", "cuda"]
    count = "2" if dry_run else "4"
    fraction = 1.0
    if not dry_run:
        from torch.cuda import get_device_properties

        from diffusionblocks.planning.card import RESERVED

        asked = [sys.executable, "-m", "diffusionblocks.cli", "plan", *train, "--num-blocks", count, "--json"]
        plan = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
        peaks = {row["method"]: row["predicted"]["total"] for row in plan["rows"]}
        limit = (peaks["end-to-end"] + peaks["diffusionblocks"]) / 2 * RESERVED  # the share limits what is reserved
        fraction = limit / get_device_properties(0).total_memory
        results.content |= {"limit_bytes": limit, "predicted": peaks}
    with tempfile.TemporaryDirectory(prefix="gpu-card-") as folder, ThreadPoolExecutor(1) as beside:
        whole = ["train", *train, "--method", "end-to-end", "--output-dir", f"{folder}/end-to-end"]
        blocks = ["train", *train, "--num-blocks", count, "--output-dir", f"{folder}/blocks"]
        small = beside.submit(dblocks_run, fraction, blocks)
        if dry_run:
            results.add({"row": "end-to-end", "expected_exit": 0, **dblocks_run(1.0, whole)})
        else:
            stopped = dblocks_run(1.0, whole, Path(folder) / "end-to-end" / "checkpoints")
            results.add({"row": "end-to-end, whole card, stopped by Ctrl-C", "expected_exit": 130, **stopped})
            results.add({"row": "end-to-end, small card", "expected_exit": 1, **dblocks_run(fraction, whole)})
            results.add({"row": "end-to-end, whole card again", "expected_exit": 0, **dblocks_run(1.0, whole)})
        results.add({"row": "diffusionblocks, small card", "expected_exit": 0, **small.result()})


# ---------------------------------------------------------------- parts


@dataclass(frozen=True)
class Part:
    """limit: seconds after which it is stopped. expected: seconds on one H100, estimated from what single steps took.
    needs: packages, beside ENOUGH, without which it is skipped."""

    run: Callable[[Any, bool], None]
    limit: int
    expected: int
    needs: tuple[str, ...] = ()


# Seconds, for today's speeds: `speed` 12 to start, 15 to split networks, 70 for 23 rows of about 6 calls each and their
# rivals, 48 for 4 compilations; `large` 15 to start, 12 for `full`, 28 + 4 + 3 x 1.5 with pinning, then 3 x 1.6 and
# 3 x 4; `tests` 24 minutes of one core over 10 processes, and CUDA's start; `memory` 40 rows of 12, 5 at a time; `card`
# plan 15 and three runs of 15 one after another.
PARTS = {
    "speed": Part(speed, 170, 145),
    "large": Part(large, 95, 80),
    "tests": Part(tests, 215, 190, ("pytest",)),
    "memory": Part(memory, 215, 110),
    "card": Part(card, 215, 60, ("rich", "sklearn")),
}
STAGES = (
    ("speed",),
    ("large",),
    ("tests", "memory", "card"),
)  # the parts of one run together; limits add up to 8 minutes


def missing(packages: tuple[str, ...]) -> list[str]:
    return [package for package in packages if find_spec(package) is None]


def use_this_checkout() -> None:
    """Here and in the processes that are started: what is measured is this checkout, installed or not."""
    sys.path.insert(0, SOURCES)
    os.environ["PYTHONPATH"] = os.pathsep.join([SOURCES, *filter(None, [os.environ.get("PYTHONPATH")])])


def run_part(name: str, folder: Path, dry_run: bool) -> int:
    """In this process. 0 if every row was measured or skipped."""
    from gpu_results import Results

    results = Results(folder, name, dry_run)
    if lacking := missing(PARTS[name].needs):
        results.skip(name, ", ".join(lacking))
    else:
        PARTS[name].run(results, dry_run)
    results.finish()
    return 1 if results.content["errors"] else 0


def run_stage(names: list[str], folder: Path, dry_run: bool) -> dict[str, int | None]:
    """Each part as a process of its own, all at once. Exit codes; None: stopped at its limit."""
    own = dict(os.environ)
    if dry_run:  # compiling takes longer than all the rest, and one thread shows as much as many
        own |= {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = ["--output-dir", str(folder), "--in-this-process", *(["--dry-run"] if dry_run else [])]
    began, codes = time.monotonic(), dict[str, int | None]()
    started = {
        name: subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), name, *words], env=own, start_new_session=True
        )
        for name in names
    }
    try:
        for name in sorted(started, key=lambda name: PARTS[name].limit):
            left = began + PARTS[name].limit - time.monotonic()
            try:
                codes[name] = started[name].wait(max(0.0, left))
            except subprocess.TimeoutExpired:
                codes[name] = None
                stop(started[name])
            ended = "stopped at its limit" if codes[name] is None else f"exit code {codes[name]}"
            print(f"=== {name}: {ended}, {time.monotonic() - began:.0f} s", flush=True)
    finally:
        for process in started.values():
            stop(process)
    return codes


def stop(process: subprocess.Popen[bytes]) -> None:
    """With everything that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def report(folder: Path) -> None:
    from gpu_results import must_hold, read

    found = must_hold(folder)
    widths = [max(len(line[column]) for line in found) for column in (0, 1)]
    for claim, figure, verdict in found:
        print(f"{claim:{widths[0]}}  {figure:{widths[1]}}  {verdict}")
    for part in PARTS:
        for row in read(folder, part).get("errors", []):
            print(f"could not run  {part}: {row['row']}: {row['error'].splitlines()[-1]}")
        for row in read(folder, part).get("not_run", []):
            print(f"skipped        {part}: {row['row']} needs {row['needs']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["all", *PARTS], metavar="part", help=f"all or {', '.join(PARTS)}")
    parser.add_argument("--dry-run", action="store_true", help="tiny networks on the CPU; the figures mean nothing")
    parser.add_argument("--output-dir", type=Path, help="of the JSONs (default: benchmarks/results; dry: temporary)")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    use_this_checkout()
    folder = arguments.output_dir or (Path(tempfile.mkdtemp(prefix="gpu-dry-")) if arguments.dry_run else RESULTS)
    if arguments.in_this_process:
        return run_part(arguments.parts[0], folder.resolve(), arguments.dry_run)
    wanted = list(PARTS) if "all" in arguments.parts else arguments.parts
    known = dict.fromkeys([*ENOUGH, *(need for part in PARTS.values() for need in part.needs), *ROWS_NEED])
    print(f"not installed: {', '.join(missing(tuple(known))) or 'nothing'}", flush=True)
    if lacking := missing(ENOUGH):
        print(f"nothing can run without {', '.join(lacking)}")
        return 1
    codes = dict[str, int | None]()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that parts, which have process groups of their own, stop too
    for stage in (tuple(PARTS),) if arguments.dry_run else STAGES:  # times of a dry run mean nothing
        if names := [name for name in stage if name in wanted]:
            codes |= run_stage(names, folder.resolve(), arguments.dry_run)
    if arguments.dry_run:
        print("A dry run: none of these figures means anything.")
    report(folder)
    print(f"results in {folder}")
    return 0 if all(code == 0 for code in codes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

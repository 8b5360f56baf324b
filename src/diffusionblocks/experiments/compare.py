"""Methods side by side: the same recipe, data and budget, several seeds, one table.

Every run is a process of its own (`dblocks train`), so that memory and random state are its own, and has its own run
folder, so that an interrupted comparison goes on where it stopped. These processes end with this one, however it ends:
each has a pipe as its standard input, and takes the end of that for SIGTERM.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from diffusionblocks.errors import Failed, RunStopped, UserError
from diffusionblocks.experiments.folder import SUMMARY_SHAPE, read_summary
from diffusionblocks.methods import find_method, for_method
from diffusionblocks.methods.budget import steps_for_budget
from diffusionblocks.options import Range, check_value
from diffusionblocks.recipes import Recipe
from diffusionblocks.recipes.keys import written
from diffusionblocks.system import files, plain_yaml, run_folder
from diffusionblocks.system.interruption import GRACE, PARENT, Terminated
from diffusionblocks.system.trust import trusted
from diffusionblocks.training.progress import read_journal

log = logging.getLogger("diffusionblocks")
SPEAK_SECONDS = 30.0
SAVING = 120.0  # seconds that a run may take to save, when it is to end
PATIENCE = 30.0  # seconds that a run waits for the one before it in its folder, whose comparison was killed


@dataclass(frozen=True)
class _Job:
    method: str
    seed: int
    folder: Path
    config: Path
    flags: tuple[str, ...] = ()


def compare(
    recipe: Recipe,
    methods: Sequence[str],
    output_dir: Path,
    *,
    seeds: int = 1,
    budget: str = "layer-evaluations",
    jobs: int = 1,
) -> list[dict[str, Any]]:
    """Runs every method with every seed and returns one result per method (see `summarise`).

    Args:
        recipe: `train.steps` are the end-to-end network's; other methods get the steps of the same budget.
        seeds: how many, counted from `train.seed`.
        budget: `layer-evaluations` or `samples`.
        jobs: processes at once; the CPU cores are shared out among them.

    Raises UserError or Failed when a run fails, as it did, and RunStopped after Ctrl-C or SIGTERM.
    """
    check_value("--seeds", seeds, int, Range(least=1, most=10_000))
    check_value("--jobs", jobs, int, Range(least=1, most=1024))
    if not methods:
        raise UserError("--methods is empty")
    if twice := [name for index, name in enumerate(methods) if name in methods[:index]]:
        raise UserError(f"--methods names {twice[0]!r} twice: one run would count as two (--seeds 2 makes two)")
    if any(find_method(name).as_it_came for name in methods):  # its row is what the others were before
        recipe = dataclasses.replace(recipe, task=recipe.task.without_before())
    todo = [_job(recipe, method, recipe.train.seed + i, budget, output_dir) for i in range(seeds) for method in methods]
    with run_folder.held(output_dir):
        for job, own in todo:
            files.write_text(job.config, plain_yaml.dump(written(own.as_dict())))
        _run_all([job for job, _ in todo], jobs)
        results = []
        for method in methods:
            runs = [read_summary(job.folder) for job, _ in todo if job.method == method]
            results.append({**summarise(runs), "budget": budget})
        files.write_json(output_dir / run_folder.COMPARISON, {"results": results, "pairs": pairs(results)})
    return results


def read_comparison(folder: Path) -> list[dict[str, Any]]:
    """The results that `compare` wrote. Raises Damaged (a UserError)."""
    path, fix = folder / run_folder.COMPARISON, "remove it, and the same dblocks compare command makes it again"
    results = files.read_json(path, {"results": list}, fix)["results"]
    for result in results:
        shape = {key: kind for key, kind in SUMMARY_SHAPE.items() if key not in ("seed", "block_steps", "warnings")}
        shape |= {"samples_seen": (int, float), "seeds": list}
        wrong = files.misfit(result, shape) if isinstance(result, dict) else "a result is no object"
        if wrong is not None:
            raise files.Damaged(path, wrong, fix)
    if not results:
        raise files.Damaged(path, "it has no results", fix)
    return results


def _job(recipe: Recipe, method: str, seed: int, budget: str, output_dir: Path) -> tuple[_Job, Recipe]:
    """A run and its recipe."""
    find_method(method)
    for_method(recipe, method).train.check()  # before others have trained for hours
    train = dataclasses.replace(recipe.train, seed=seed, steps=steps_for_budget(recipe, method, budget))
    # The preset is already in the values; named again in the file, it would be laid over them once more.
    own = dataclasses.replace(recipe, method=method, train=train, preset="")
    folder = output_dir / method / f"seed-{seed}"
    return _Job(method, seed, folder, output_dir / method / f"seed-{seed}.yaml", consent_flags(own)), own


def consent_flags(recipe: Recipe) -> tuple[str, ...]:
    """Flags with which a process of its own may run what this one may."""
    flags = ["--trust-inception"] if trusted().inception or getattr(recipe.task, "inception", False) else []
    groups: dict[str, Any] = {"model": recipe.model, "data": recipe.data}
    wanted = {name: group.trust_remote_code for name, group in groups.items() if hasattr(group, "trust_remote_code")}
    if trusted().remote_code or any(wanted.values()):
        # The flag sets both options, which may be one here.
        each = [f"--{name}.trust-remote-code={str(value).lower()}" for name, value in wanted.items()]
        flags += ["--trust-remote-code", *each]
    return tuple(flags)


def _run_all(todo: list[_Job], jobs: int) -> None:
    waiting, done = list(todo), 0
    running: dict[_Job, subprocess.Popen[bytes]] = {}
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), PARENT: "1", run_folder.WAIT: str(PATIENCE)}
    started = spoken = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                job = waiting.pop(0)
                log.info("[%d/%d] %s, seed %d", len(todo) - len(waiting), len(todo), job.method, job.seed)
                running[job] = _start(job, environment)
            for job, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                _check_ended(job, process.returncode)
                done += 1
            if time.monotonic() - spoken > SPEAK_SECONDS:
                spoken = time.monotonic()
                log.info(
                    "%d of %d runs done after %.0f s; running: %s", done, len(todo), spoken - started, _where(running)
                )
            time.sleep(0.1)
    except KeyboardInterrupt as interrupt:
        _end(running)
        number = signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
        left = "every unfinished run goes on from its last checkpoint when you run the same command again"
        raise RunStopped(f"stopped; {left}", number) from None
    finally:
        _end(running)


def _end(running: dict[_Job, subprocess.Popen[bytes]]) -> None:
    """SIGTERM for every run; waits until they have saved and ended."""
    for process in running.values():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in running.values():
        try:
            process.wait(timeout=GRACE + SAVING)
        except subprocess.TimeoutExpired:
            process.kill()


def _check_ended(job: _Job, code: int) -> None:
    """Raises what the run's exit code says of how it ended."""
    if code == 0:
        return
    if code == 130:
        raise KeyboardInterrupt
    lines = _log_of(job).read_text(errors="replace").strip().splitlines()
    reason = lines[-1].removeprefix("dblocks: ") if lines else f"exit code {code}"
    if code < 0:
        reason = f"it was killed by signal {-code}; run the same command to go on ({reason})"
    raise (UserError if code == 2 else Failed)(f"{job.method}, seed {job.seed} failed: {reason}")


def _log_of(job: _Job) -> Path:
    return job.folder.parent / f"seed-{job.seed}.log"


def _start(job: _Job, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    # -P: nothing in the current folder is imported. A session of its own: Ctrl-C on a terminal comes to us, who pass it
    # on.
    command = [sys.executable, "-P", "-m", "diffusionblocks.cli", "train", str(job.config)]
    command += ["--output-dir", str(job.folder), *job.flags]
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    with _log_of(job).open("wb") as stream:
        return subprocess.Popen(command, stderr=stream, env=environment, start_new_session=True, **pipes)


def _where(running: dict[_Job, Any]) -> str:
    parts = []
    for job in running:
        steps = 0
        with contextlib.suppress(OSError, UserError):  # its last line may be half written
            steps = (read_journal(job.folder, whole=False) or [{"block_steps": 0}])[-1]["block_steps"]
        parts.append(f"{job.method} (block step {steps})")
    return ", ".join(parts)


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several seeds of one method -> one result: means, standard errors over seeds (over samples for one seed), and
    each seed's value."""
    first = runs[0]
    metrics = {name: _over_seeds([run["metrics"][name] for run in runs]) for name in first["metrics"]}
    return {
        "method": first["method"],
        "recipe": first["recipe"],
        "seeds": [run["seed"] for run in runs],
        "num_blocks": first["num_blocks"],
        "metrics": metrics,
        "layer_evaluations": statistics.fmean(run["layer_evaluations"] for run in runs),
        **_layers_per_token(runs),
        "samples_seen": statistics.fmean(run["samples_seen"] for run in runs),
        "wall_seconds": statistics.fmean(run["wall_seconds"] for run in runs),
        "peak_memory": max((run["peak_memory"] for run in runs), key=lambda peak: peak["total"]),
        "versions": first["versions"],
        "git_commit": first["git_commit"],
    }


def _layers_per_token(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of looped networks."""
    if not all("layers_per_token" in run for run in runs):
        return {}
    each = [run["layers_per_token"] for run in runs]
    return {"layers_per_token": {name: statistics.fmean(one[name] for one in each) for name in each[0]}}


def _over_seeds(values: list[dict[str, Any]]) -> dict[str, Any]:
    if len(values) == 1:
        return values[0]
    numbers = [value["value"] for value in values]
    error = statistics.stdev(numbers) / math.sqrt(len(numbers))
    return {"value": statistics.fmean(numbers), "stderr": error, "each": numbers}


def pairs(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By how much methods that train blocks differ from the others in the first metric, seed by seed.

    Runs of one seed share the split of the data and, where shapes allow, first weights and batches, so that differences
    within a seed spread less than methods do over seeds.

    Args:
        results: of `compare`, with at least two seeds (else there are no pairs).

    Returns one dict per pair: method, against, metric, value (mean difference), stderr (over seeds), each.
    """
    name, found = next(iter(results[0]["metrics"])), []
    several = [result for result in results if "each" in result["metrics"].get(name, {})]
    by_blocks = [result for result in several if find_method(result["method"]).by_blocks]
    for ours, theirs in product(by_blocks, [result for result in several if result not in by_blocks]):
        values = zip(*(result["metrics"][name]["each"] for result in (ours, theirs)), strict=True)
        difference = _over_seeds([{"value": own - other} for own, other in values])
        found.append({"method": ours["method"], "against": theirs["method"], "metric": name, **difference})
    return found


def default_output(recipe: Recipe, kind: str) -> Path:
    """runs/<recipe>[-preset], or runs/compare-<recipe>."""
    name = f"{recipe.name}-{recipe.preset}" if recipe.preset else recipe.name
    return Path("runs") / (
        f"compare-{name}" if kind == "compare" else f"{name}-{recipe.method}-seed{recipe.train.seed}"
    )

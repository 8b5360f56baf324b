"""Measuring a run: the task's metrics on the split that the recipe evaluates on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffusionblocks.errors import UserError
from diffusionblocks.evaluation.harness import evaluate_tasks
from diffusionblocks.experiments.folder import read_summary
from diffusionblocks.experiments.memory import NOTHING, throwaway_peak
from diffusionblocks.experiments.run import Run, load_run
from diffusionblocks.experiments.summary import made, measured, summarised
from diffusionblocks.methods import find_method
from diffusionblocks.system.run_folder import SUMMARY
from diffusionblocks.training.task import Metric, check_finite

log = logging.getLogger("diffusionblocks")


def evaluate(folder: Path, overrides: Iterable[tuple[str, Any]] = ()) -> dict[str, Any]:
    """Evaluates a run's newest checkpoint on its test split; the run's own summary supplies costs and memory."""
    run = load_run(folder, overrides)
    metrics, progress = measure(run), run.trainer.progress
    trains = find_method(run.recipe.method).trains
    if not (folder / SUMMARY).is_file():
        return summarised(run, metrics, throwaway_peak(run.recipe, run.data) if trains else NOTHING, [])
    own = read_summary(folder)
    if trains and not progress.finished:
        log.warning("this evaluates an earlier checkpoint of %s, after %d block steps", folder, progress.block_steps)
    earlier = {name: metric for name, metric in own["metrics"].items() if name.endswith("_before")}
    now = measured(run, metrics)
    return {**own, **now, "metrics": {**now["metrics"], **earlier}, **(made(run) if trains else {})}


def measure(run: Run) -> dict[str, Metric]:
    """What the task measures of a finished run. Raises Failed for a metric that is not finite."""
    trained = run.trained
    metrics = trained.evaluate(run.split)
    with run.trainer.averaged():
        return check_finite(run.recipe.task.measure(trained, run.split, metrics))


def evaluate_with_harness(
    folder: Path,
    tasks: Sequence[str],
    overrides: Iterable[tuple[str, Any]] = (),
    *,
    path: str | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of lm-evaluation-harness by task; see `evaluate_tasks`.

    Raises UserError for a run that does not write token by token.
    """
    run = load_run(folder, overrides, with_data=False)
    model = run.recipe.task.language_model(run.trained)
    if find_method(run.recipe.method).adds_context:
        raise UserError(f"a run of the method {run.recipe.method} has no model of its own: score the method original")
    with run.trainer.averaged():
        return evaluate_tasks(model, tasks, path, limit)

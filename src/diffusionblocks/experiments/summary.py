"""summary.json of a finished run: its metrics, what they cost, and where its result is."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from diffusionblocks import __version__
from diffusionblocks.experiments.run import Run
from diffusionblocks.methods import find_method
from diffusionblocks.planning.measure import PeakMemory
from diffusionblocks.training.task import Metric


def summarised(run: Run, metrics: dict[str, Metric], memory: PeakMemory, messages: list[str]) -> dict[str, Any]:
    """What summary.json holds. messages: warnings of the run."""
    recipe = run.recipe
    return {
        "method": recipe.method,
        "recipe": recipe.name,
        "preset": recipe.preset,
        "seed": recipe.train.seed,
        "num_blocks": run.model.num_blocks,
        "layers": [[span.start, span.stop - 1] for span in run.model.layers],
        **measured(run, metrics),
        **run.data.facts,
        **made(run),
        "result": find_method(recipe.method).result(recipe, run.model)._asdict(),
        "peak_memory": memory.as_dict(),
        "versions": versions(),
        "git_commit": git_commit(),
        "warnings": messages,
    }


def measured(run: Run, metrics: dict[str, Metric]) -> dict[str, Any]:
    """The metrics, and how the samples were made that some of them are of."""
    task = run.recipe.task
    how = {name: getattr(task, name) for name in task.sampled(run.model)}
    found = {name: metric._asdict() for name, metric in metrics.items()}
    return {"evaluated_on": run.recipe.evaluate_on, "metrics": found, **({"sampling": how} if how else {})}


def made(run: Run) -> dict[str, Any]:
    """What training took so far."""
    progress = run.trainer.progress
    inference = run.recipe.task.inference_layers(run.model)
    trained = progress.layer_evaluations / max(1, progress.samples_seen)
    applied = {} if inference is None else {"layers_per_token": {"training": trained, "inference": inference}}
    return {
        "layer_evaluations": progress.layer_evaluations,
        "samples_seen": progress.samples_seen,
        **applied,
        "block_steps": progress.block_steps,
        "wall_seconds": round(progress.wall_seconds, 3),
    }


def versions() -> dict[str, str]:
    import transformers

    return {
        "diffusionblocks": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def git_commit() -> str | None:
    """Commit of the package's own checkout, None when it is installed without one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

"""What adapting a pretrained language model changed: likelihood before and after, of the domain's text and of general
text, and what the model writes.
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusionblocks.experiments.run import Run
from diffusionblocks.methods import find_method
from diffusionblocks.methods.in_context import InContext
from diffusionblocks.system import files
from diffusionblocks.system.run_folder import BEFORE, SAMPLES
from diffusionblocks.training import checkpoint
from diffusionblocks.training.task import Metric

log = logging.getLogger("diffusionblocks")


def adapts(run: Run) -> bool:
    """Whether a run adapts a pretrained language model whose function its model has from the start."""
    return bool(run.recipe.model.pretrained) and run.recipe.task.writes and run.model.is_ordinary


def before(run: Run, folder: Path) -> dict[str, Metric]:
    """Likelihoods of the model as it came, measured once per run: `nats_per_token_before` and the like. Call it before
    the first step and before a checkpoint is restored."""
    task = run.recipe.task
    if not (adapts(run) and task.compares_before() and find_method(run.recipe.method).trains):
        return {}
    path = folder / BEFORE
    measured = files.there(path, _FIX)
    if not measured and checkpoint.existing(folder):
        log.info("%s has begun to train: what the network was before is not measured", folder)
        return {}
    if not measured:
        found = task.measure_before(run.trained, run.split)
        written = [one["written"] for one in continuations(run)]
        content = {"metrics": {name: metric._asdict() for name, metric in found.items()}, "written": written}
        files.write_json(path, content)
    metrics = _read_before(path)["metrics"]
    return {f"{name}_before": Metric(**metric) for name, metric in metrics.items()}


_FIX = "remove it: the run goes on without what the network was before"


def _read_before(path: Path) -> dict[str, Any]:
    found = files.read_json(path, {"metrics": dict, "written": list}, _FIX)
    if not all(isinstance(one, dict) and one.keys() == {"value", "stderr"} for one in found["metrics"].values()):
        raise files.Damaged(path, "its metrics have no value and standard error", _FIX)
    return found


def write_samples(run: Run, folder: Path) -> None:
    """samples.json: how the adapted model goes on from held-out texts, beside the real text and what the model wrote
    before."""
    made = continuations(run)
    if not made:
        return
    if files.there(folder / BEFORE, _FIX):
        for one, text in zip(made, _read_before(folder / BEFORE)["written"], strict=False):
            one["before"] = text
    files.write_json(folder / SAMPLES, {"continuations": made})


def read_samples(folder: Path) -> list[dict[str, str]]:
    """What `write_samples` wrote; nothing where a run has none. Raises Damaged (a UserError)."""
    path, fix = folder / SAMPLES, "remove it, and the report has no continuations"
    if not files.there(path, fix):
        return []
    texts = None
    if path.read_bytes().lstrip()[:1] == b"[":  # of an earlier version, without a seal
        with contextlib.suppress(ValueError, RecursionError):
            texts = json.loads(files.read_text(path))
    else:
        texts = files.read_json(path, fix=fix).get("continuations")
    if not isinstance(texts, list) or not all(isinstance(one, dict) and _is_text(one) for one in texts):
        raise files.Damaged(path, "its texts are not what was written", fix)
    return texts


def _is_text(one: dict[str, Any]) -> bool:
    return {"prompt", "real", "written"} <= one.keys() and all(isinstance(text, str) for text in one.values())


def continuations(run: Run) -> list[dict[str, str]]:
    """How the adapted model continues held-out texts; nothing where there is none. Each has `prompt`, `real` and
    `written`."""
    if not adapts(run):
        return []
    scored = find_method(run.recipe.method).scored(run.recipe, run.data, run.split)

    def context(prompt: Tensor) -> Tensor:
        if not isinstance(scored, InContext):
            return prompt.new_empty(0)
        return torch.from_numpy(scored.context(prompt.numpy()))

    with run.trainer.averaged():
        return run.recipe.task.continuations_of(run.trained, run.split, context)

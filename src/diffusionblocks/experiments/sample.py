"""Samples of a trained run, shown or in a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusionblocks.data.images.grid import write_grid
from diffusionblocks.errors import UserError
from diffusionblocks.experiments.run import Run, settled
from diffusionblocks.methods import find_method
from diffusionblocks.system.files import replacing, write_text
from diffusionblocks.training.task import Asked, Images, Made, Sampling


def sampling_of(run: Run) -> Sampling:
    """What the run makes, and which options of `dblocks sample` have a meaning for it. Raises UserError where it makes
    nothing."""
    if find_method(run.recipe.method).adds_context:
        raise UserError(
            f"a run of the method {run.recipe.method} has no model of its own: its texts are in samples.json and "
            "report.html"
        )
    found = run.recipe.task.sampling(run.model)
    if found is None:
        raise UserError(f"the task {run.recipe.task.kind} has nothing to sample")
    left = {option: field for option, field in found.settings.items() if field not in settled(run.recipe)}
    return found._replace(settings=left)


def check_options(sampling: Sampling, given: Collection[str]) -> None:
    """Raises UserError for an option that has no meaning for what a run makes."""
    for name in given:
        if name not in (*sampling.options, *sampling.settings):
            raise UserError(f"--{name.replace('_', '-')} has no meaning here: this run makes {sampling.makes}")


def check_file(sampling: Sampling, output: Path) -> None:
    """Raises UserError for a kind of file that samples are not written to."""
    if sampling.endings and output.suffix not in sampling.endings:
        known = " or ".join(f"{ending} ({what})" for ending, what in sampling.endings.items())
        raise UserError(f"--output must end in {known}, got {output.name!r}")


def sample(run: Run, asked: Asked, settings: Mapping[str, Any] | None = None, output: Path | None = None) -> Made:
    """Makes samples, and writes them to `output` where it is given.

    Args:
        settings: fields of the task that differ from the run's. output: text; or a PNG grid or an .npz of images
            (arr_0 uint8 [N, height, width, 3], arr_1 labels [N]: what the evaluator of ADM, Dhariwal & Nichol 2021,
            reads).

    Raises UserError for what the task cannot make.
    """
    if asked.num < 1:
        raise UserError(f"--num must be at least 1, got {asked.num}")
    if asked.stream is not None and asked.num > 1:
        raise UserError(f"--stream writes one text; got --num {asked.num}")
    task = dataclasses.replace(run.recipe.task, **(settings or {}))
    with run.trainer.averaged():
        made = task.make(run.trained, asked)
    if output is not None:
        _write(made.content, output)
        made.found["output"] = str(output)
    return made


def _write(content: str | Images, output: Path) -> None:
    if isinstance(content, str):
        write_text(output, content)
        return
    with replacing(output) as partial:
        if output.suffix == ".npz":
            array = content.images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
            with partial.open("wb") as stream:
                np.savez(stream, array, content.labels.numpy())
        else:
            write_grid(content.images, partial)

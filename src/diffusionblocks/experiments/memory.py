"""Peak memory of a run's training steps, measured on a model that is thrown away."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from diffusionblocks.data.splits import Splits
from diffusionblocks.experiments.run import Run, prepare
from diffusionblocks.planning.measure import PeakMemory, measure_peak
from diffusionblocks.recipes import Recipe

NOTHING = PeakMemory(
    parameters=0, gradients=0, optimizer=0, activations=0, total=0, how_measured="nothing is trained", device="none"
)


def peak(run: Run) -> PeakMemory:
    """Of a run whose trained model is still there."""
    return (_cuda_peak if run.trainer.device.type == "cuda" else throwaway_peak)(run.recipe, run.data)


def throwaway_peak(recipe: Recipe, data: Splits) -> PeakMemory:
    """Of the recipe's steps."""
    # The steps after heads have settled are the larger ones.
    changes: dict[str, Any] = {"compile": False, "tensorboard": False, "heads_first": 0.0}
    train = dataclasses.replace(recipe.train, **changes)
    recipe = dataclasses.replace(recipe, train=train, task=recipe.task.longest())
    return measure_peak(prepare(recipe, None, data).trainer)


def _cuda_peak(recipe: Recipe, data: Splits) -> PeakMemory:
    torch.cuda.empty_cache()  # the trained model stays allocated: measure against a clean baseline
    held = torch.cuda.memory_allocated()
    peak = throwaway_peak(recipe, data)
    return dataclasses.replace(peak, total=peak.total - held, activations=peak.activations - held)

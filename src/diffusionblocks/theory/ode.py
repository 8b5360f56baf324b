"""Sampling along the probability-flow ODE dz/dsigma = (z - D(z; sigma)) / sigma ([EDM] eq. 1 and algorithm 1).

Per step, a denoiser runs once (`euler`, `dpm_solver`) or twice (`heun`, `churn`; once where the step ends at 0).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from diffusionblocks.seeds import normal_like
from diffusionblocks.theory.precondition import euler_step
from diffusionblocks.theory.sampler import Denoise, Sampler

CHURN, CHURN_NOISE = 40.0, 1.003  # [EDM] table 5, ImageNet-64
CHURN_RANGE = (0.05, 50.0)


def euler(denoise: Denoise, z: Tensor, levels: list[float], *, generator: torch.Generator | None = None) -> Tensor:
    """First order: Euler steps with the denoiser's estimate ([EDM] algorithm 1 without correction; [DB] eq. 5)."""
    for level, following in pairwise(levels):
        z = _euler(z, denoise(z, level).estimate, level, following)
    return z


def heun(denoise: Denoise, z: Tensor, levels: list[float], *, generator: torch.Generator | None = None) -> Tensor:
    """Second order: an Euler step, corrected by the slope where it lands ([EDM] algorithm 1)."""
    for level, following in pairwise(levels):
        z = _heun(denoise, z, level, following)
    return z


def dpm_solver(denoise: Denoise, z: Tensor, levels: list[float], *, generator: torch.Generator | None = None) -> Tensor:
    """Second order, one evaluation per step: DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    In terms of lambda = -log sigma; the first step and the step to 0 are of first order.
    """
    before: Tensor | None = None
    width_before = math.inf
    for level, following in pairwise(levels):
        estimate = denoise(z, level).estimate
        guess = estimate
        if following > 0:
            width = math.log(level / following)
            if before is not None:
                guess = torch.lerp(before, estimate, 1 + width / (2 * width_before))
            before, width_before = estimate, width
        z = _euler(z, guess, level, following)
    return z


def churn(denoise: Denoise, z: Tensor, levels: list[float], *, generator: torch.Generator | None = None) -> Tensor:
    """Heun steps that first add noise, so that errors of earlier steps are forgotten ([EDM] algorithm 2).

    The raised level never exceeds the highest one, where the denoiser's range ends.
    """
    share = min(CHURN / max(1, len(levels) - 1), math.sqrt(2) - 1)
    for level, following in pairwise(levels):
        raised = min(level * (1 + share), levels[0]) if CHURN_RANGE[0] <= level <= CHURN_RANGE[1] else level
        if raised > level:
            noise = normal_like(z, generator)
            z = z + math.sqrt(raised**2 - level**2) * CHURN_NOISE * noise
        z = _heun(denoise, z, raised, following)
    return z


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "dpm-solver++": dpm_solver, "churn": churn}


def _heun(denoise: Denoise, z: Tensor, level: float, following: float) -> Tensor:
    slope = (z - denoise(z, level).estimate.to(z)) / level
    there = z + (following - level) * slope
    if following == 0:
        return there
    corrected = (there - denoise(there, following).estimate.to(z)) / following
    return z + (following - level) * (slope + corrected) / 2


def _euler(z: Tensor, estimate: Tensor, level: float, following: float) -> Tensor:
    return euler_step(z, estimate.to(z), z.new_full((len(z),), level), z.new_full((len(z),), following))

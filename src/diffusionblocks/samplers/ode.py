"""Deterministic sampling along the probability-flow ODE."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusionblocks.network import DenoiserOutput
from diffusionblocks.precondition import euler_step
from diffusionblocks.samplers import Denoise


def euler(
    denoise: Denoise, z: Tensor, levels: list[float], *, generator: torch.Generator | None = None
) -> list[DenoiserOutput]:
    """Euler steps with the denoiser's estimate ([EDM] algorithm 2 without correction; [DB] eq. 5)."""
    outputs = []
    for index, level in enumerate(levels):
        outputs.append(denoise(z, level))
        if index + 1 < len(levels):
            here, there = z.new_full((len(z),), level), z.new_full((len(z),), levels[index + 1])
            z = euler_step(z, outputs[-1].estimate.to(z), here, there)
    return outputs
